"""The device of a model."""

import torch

from pyqemb import ops
from pyqemb.errors import ConfigError
from pyqemb.model.config import DecoderConfig

_CUDA_HEAD_DIMS = 64, 128  # supported by the CUDA attention


def runs_on_cuda(config: DecoderConfig) -> bool:
    """Whether the CUDA kernels can run a model of these sizes."""
    return config.head_dim in _CUDA_HEAD_DIMS


def pick_device(name: torch.device | str | None, config: DecoderConfig) -> torch.device:
    """The device of that name; None and "auto": a GPU that can run the model, else the CPU."""
    if name is None or name == "auto":
        return torch.device("cuda" if runs_on_cuda(config) and _cuda_is_there() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: expected 'auto', 'cpu' or 'cuda', got {name!r}") from error
    if device.type == "cuda" and not _cuda_is_there():
        missing = "pyqemb was built without CUDA" if torch.cuda.is_available() else "torch finds no CUDA device"
        raise ConfigError(f"device: {str(name)!r} was requested, but {missing}")
    return device


def search_device(model: object) -> torch.device:
    """The device for searches among the vectors of a model: its GPU, else the CPU."""
    device = torch.device(getattr(model, "device", None) or "cpu")
    return device if device.type == "cuda" and _cuda_is_there() else torch.device("cpu")


def _cuda_is_there() -> bool:
    return torch.cuda.is_available() and ops.cuda_is_built()
