"""Where a model runs, and in which precision when nothing says so."""

import torch

from pyqemb import ops
from pyqemb.errors import ConfigError
from pyqemb.model.config import DecoderConfig

_CUDA_HEAD_DIMS = 64, 128  # of the CUDA attention


def runs_on_cuda(config: DecoderConfig) -> bool:
    """Whether the CUDA kernels can run a model of these sizes."""
    return config.head_dim in _CUDA_HEAD_DIMS


def pick_device(name: torch.device | str | None, config: DecoderConfig) -> torch.device:
    """The device of that name; None and "auto": the GPU where there is one that can run the model, else the CPU."""
    if name is None or name == "auto":
        return torch.device("cuda" if runs_on_cuda(config) and _cuda_is_there() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: expected 'auto', 'cpu' or 'cuda', got {name!r}") from error
    if device.type == "cuda" and not _cuda_is_there():
        missing = "pyqemb was built without CUDA" if torch.cuda.is_available() else "torch finds no CUDA device"
        raise ConfigError(f"device: {str(name)!r} was asked for, but {missing}")
    return device


def search_device(model: object) -> torch.device:
    """Where to search among a model's vectors: on its GPU, for the CPU and anything else on the CPU."""
    device = torch.device(getattr(model, "device", None) or "cpu")
    return device if device.type == "cuda" and _cuda_is_there() else torch.device("cpu")


def _cuda_is_there() -> bool:
    return torch.cuda.is_available() and ops.cuda_is_built()
