"""How a model is opened: folder or hub id, attention mask, dtype."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from pyqemb.data.machine import raise_if_machine
from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.model.config import DecoderConfig

Attention = Literal["causal", "bidirectional"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = "*.safetensors"
_HUB_FILES = ["*.json", "*.txt", "*.jinja"]


def local_folder(folder: str | Path, weights: bool = True) -> Path:
    """A local folder; for `org/name`, the files downloaded from the hub, with or without the weights."""
    path = Path(folder)
    if path.exists() or not (isinstance(folder, str) and _HUB_ID.fullmatch(folder)):
        if not path.is_dir():
            raise CheckpointError(f"{folder}: no such model folder")
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{folder}: no such folder here; to download it as a hub id: pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(folder, allow_patterns=[*[_WEIGHTS] * weights, *_HUB_FILES]))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise_if_machine(folder, error)
        raise CheckpointError(f"{folder}: no such folder, and the download from the hub failed: {error}") from error


def with_attention(config: DecoderConfig, attention: str | None) -> DecoderConfig:
    """The config with that attention mask; None: unchanged."""
    if attention not in (None, "causal", "bidirectional"):
        raise ConfigError(f"attention must be 'causal', 'bidirectional' or None, got {attention!r}")
    return config if attention is None else replace(config, is_causal=attention == "causal")


def named_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The floating dtype of that name."""
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and chosen not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")
    return chosen
