"""What the ops share: the door checks that native code cannot make, and the limits of their gradients."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the kernels compute in for a storage dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
