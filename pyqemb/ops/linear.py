"""x W^T, computed by torch, with results allocated from the buffer cache."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyqemb.ops.checks import device_type, on_device_of, tensor
from pyqemb.ops.common import empty


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Return the product x W^T, differentiable.

    Args:
        x_TI: [T, I].
        weight_OI: [O, I] of the same dtype; any dtype under autocast.

    Returns:
        [T, O], the result of torch.nn.functional.linear. On the CPU the result and the gradients are allocated from a
        buffer cache, because the page faults of new memory take up to a fifth of the time of the product.

    Raises:
        TypeError: not a tensor, or different dtypes without autocast.
        ValueError: incompatible shapes.

    Example:
        >>> pyqemb.ops.linear(torch.ones(1, 3), torch.eye(3)[:2])
        tensor([[1., 1.]])
    """
    x_TI, weight_OI = tensor("linear", "x", x_TI), tensor("linear", "weight", weight_OI)
    for name, value in (("x", x_TI), ("weight", weight_OI)):
        if value.dim() != 2:
            raise ValueError(f"[linear] {name} must have two dimensions, got shape {list(value.shape)}")
        if not value.is_floating_point():
            raise TypeError(f"[linear] {name} must have a floating dtype, got {value.dtype}")
    on_device_of("linear", "weight", weight_OI, "x", x_TI)
    if x_TI.shape[1] != weight_OI.shape[1]:
        raise ValueError(f"[linear] x and weight must share their inputs, got {x_TI.shape[1]} and {weight_OI.shape[1]}")
    device = device_type(x_TI)
    if torch.is_autocast_enabled(device) or torch.compiler.is_compiling():
        return F.linear(x_TI, weight_OI)
    if x_TI.dtype != weight_OI.dtype:
        raise TypeError(f"[linear] weight must have the dtype of x, {x_TI.dtype}, got {weight_OI.dtype}")
    return _Linear.apply(x_TI, weight_OI) if device == "cpu" else F.linear(x_TI, weight_OI)


def add_known_output(x_TI: Tensor, weight_OI: Tensor, residual_TO: Tensor, sum_TO: Tensor) -> Tensor:
    """Return residual + x W^T, when this sum is known from an earlier pass.

    Args:
        x_TI: [T, I].
        weight_OI: [O, I] of the dtype of x.
        residual_TO: [T, O]; under autocast its dtype may differ from that of x.
        sum_TO: [T, O], the known sum, of the dtype of the residual.

    Returns:
        `sum_TO` itself, with the gradients of residual + x W^T.
    """
    return _AddKnownOutput.apply(x_TI, weight_OI, residual_TO, sum_TO)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.T, out=empty((len(x), len(weight)), x.dtype, x.device))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return _gradients(ctx, dy, *ctx.saved_tensors)


class _AddKnownOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, residual: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        return *_gradients(ctx, dy.to(x.dtype), x, weight), dy, None


def _gradients(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and weight, None if not needed."""
    if torch.is_grad_enabled():  # create_graph
        return dy @ weight, dy.T @ x
    dx = dweight = None
    if ctx.needs_input_grad[0]:
        dx = torch.mm(dy, weight, out=empty(x.shape, x.dtype, x.device))
    if ctx.needs_input_grad[1]:
        dweight = torch.mm(dy.T, x, out=empty(weight.shape, weight.dtype, weight.device))
    return dx, dweight
