"""The device of a model."""

import functools
import logging

import torch

from pyqemb import ops
from pyqemb.errors import ConfigError
from pyqemb.model.config import DecoderConfig

_CUDA_HEAD_DIMS = 64, 128  # supported by the CUDA attention
_LEAST_CAPABILITY = 8, 0  # of the CUDA kernels, as they are built
_LEAST_SHARED = 101_376  # bytes of shared memory for a block: the most that a kernel asks for on such a device

logger = logging.getLogger(__name__)


def runs_on_cuda(config: DecoderConfig) -> bool:
    """Whether the CUDA kernels can run a model of these sizes."""
    return config.head_dim in _CUDA_HEAD_DIMS


def pick_device(name: torch.device | str | None, config: DecoderConfig) -> torch.device:
    """The device of that name; None and "auto": a GPU that can run the model, else the CPU."""
    if name is None or name == "auto":
        return torch.device("cuda" if runs_on_cuda(config) and gpu_is_usable() else "cpu")
    device = named_device(name)
    if device.type == "cuda" and (obstacle := _obstacle(device.index)) is not None:
        raise ConfigError(f"device: {str(name)!r} was requested, but {obstacle}")
    return device


def named_device(name: torch.device | str, argument: str = "device") -> torch.device:
    """The torch.device of that name, which need not exist. ConfigError: no name of a device."""
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{argument}: expected 'auto', 'cpu' or 'cuda', got {name!r}") from error


def search_device(model: object) -> torch.device:
    """The device for searches among the vectors of a model: its GPU, else the CPU."""
    device = torch.device(getattr(model, "device", None) or "cpu")
    return device if device.type == "cuda" and _obstacle(device.index) is None else torch.device("cpu")


def gpu_is_usable() -> bool:
    """Whether there is a GPU that the CUDA kernels run on. Where there is one that they do not, a warning says why."""
    obstacle = _obstacle(None)
    if obstacle is not None and torch.cuda.is_available():
        _warn(obstacle)
    return obstacle is None


@functools.cache
def _warn(obstacle: str) -> None:
    """Once."""
    logger.warning("device: the CPU is used: %s", obstacle)


def _obstacle(index: int | None) -> str | None:
    """What keeps the CUDA kernels from running on a GPU (None: the current one); None where nothing does."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if not ops.cuda_is_built():
        return "pyqemb was built without CUDA"
    if index is not None and index >= torch.cuda.device_count():
        return f"torch finds {torch.cuda.device_count()} CUDA devices"
    found = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    if (found.major, found.minor) < _LEAST_CAPABILITY:
        least = ".".join(map(str, _LEAST_CAPABILITY))
        return (
            f"{found.name} has compute capability {found.major}.{found.minor}; the CUDA kernels need {least} or newer "
            "(A100, RTX 3090, L4, H100, ...)"
        )
    shared = getattr(found, "shared_memory_per_block_optin", _LEAST_SHARED)
    if shared < _LEAST_SHARED:
        return f"{found.name} has {shared} bytes of shared memory a block; the CUDA kernels need {_LEAST_SHARED}"
    return None
