"""What the ops share: the door checks that native code cannot make, and the limits of their gradients."""

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from pyqemb import _C

_LARGE = 1 << 20  # bytes


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the kernels compute in for a storage dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a result. A large one on the CPU comes from the blocks that earlier results have left."""
    size = math.prod(shape)
    if device.type != "cpu" or size * dtype.itemsize < _LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(_C.Block(size * dtype.itemsize), dtype=dtype).view(shape)


def empty_like(x: Tensor) -> Tensor:
    """`empty` of the shape, dtype and device of x, contiguous."""
    return empty(x.shape, x.dtype, x.device)


def checked(op: str, name: str, value: Any) -> Tensor:
    """`value`, if it is a tensor; what it holds is checked by the native code."""
    if not isinstance(value, Tensor):
        raise TypeError(f"[{op}] {name} must be a torch.Tensor, got {type(value).__name__}")
    return value


def on_host(op: str, name: str, cu_seqlens: Any) -> Tensor:
    """cu_seqlens where the CPU kernels read it."""
    return checked(op, name, cu_seqlens).contiguous().cpu()


def differentiable_once(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For a backward in native code: refuse create_graph=True instead of returning a gradient that is silently constant.

    (torch's once_differentiable notices only incoming gradients that require grad, not saved inputs.)
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def guarded(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"[{op}] is differentiable once: its gradient cannot be taken with create_graph=True"
                )
            return backward(ctx, *grads)

        return guarded

    return decorate
