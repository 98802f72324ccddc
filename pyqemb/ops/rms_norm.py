"""RMSNorm, alone or after adding a residual: one pass over memory forward and one backward."""

from typing import Any, overload

from torch import Tensor

from pyqemb import _C
from pyqemb.ops.checks import not_negative, tensor
from pyqemb.ops.common import differentiable, empty_like, native, new, new_gradient, new_rows, rounded


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Return x / rms(x) * weight over the last dimension, differentiable once.

    Args:
        x: [..., E] float32, bfloat16, float16 or float64.
        weight: [E] of the same dtype.
        eps: added to the mean square (default 1e-6).
        residual: a tensor of the shape and dtype of x; x + residual, rounded to that dtype, is normalized instead of x
            (default: none).

    Returns:
        The shape and dtype of x; arithmetic is float32 (float64 for float64). With a residual a pair (normed, x +
        residual).

    Raises:
        TypeError: not a tensor, or of the wrong dtype. ValueError: incompatible shapes, a negative eps.

    Example:
        >>> pyqemb.ops.rms_norm(torch.tensor([3.0, -3.0]), torch.ones(2))
        tensor([ 1.0000, -1.0000])

    Source: Zhang and Sennrich 2019, equation 4.
    """
    op = "rms_norm"
    x, weight, eps = tensor(op, "x", x), tensor(op, "weight", weight), not_negative(op, "eps", eps)
    if not x.dim():
        raise ValueError("[rms_norm] x must have shape [..., size], got []")
    if residual is None:
        return _rms_norm(_rows(x), weight, eps).view(x.shape)
    residual = tensor(op, "residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"[rms_norm] residual must have the shape of x, {list(x.shape)}, got {list(residual.shape)}")
    normed, total = _add_rms_norm(_rows(x), _rows(residual), weight, eps)
    return normed.view(x.shape), total.view(x.shape)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


@native(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", lambda x, weight, eps: (new(x), new_rows(x))
)
def _rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, rstd = empty_like(x), new_rows(x)
    _C.rms_norm_forward(x, None, weight, None, y, rstd, eps)
    return y, rstd


@native(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    lambda x, residual, weight, eps: (new(x), new(x), new_rows(x)),
)
def _add_rms_norm_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, total, rstd = empty_like(x), empty_like(x), new_rows(x)
    _C.rms_norm_forward(x, residual, weight, total, y, rstd, eps)
    return y, total, rstd


@native(
    "rms_norm_backward(Tensor s, Tensor weight, Tensor rstd, Tensor dy, Tensor? dsum, bool wanted) -> (Tensor, Tensor)",
    lambda s, weight, rstd, dy, dsum, wanted: (new(s), new_gradient(weight, wanted)),
)
def _rms_norm_gradient(
    s: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor, dsum: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor]:
    dx, dweight = empty_like(s), new_gradient(weight, wanted)
    dsum = None if dsum is None else dsum.contiguous()
    _C.rms_norm_backward(s, weight, rstd, dy.contiguous(), dsum, dx, dweight if wanted else None)
    return dx, dweight


def _keep_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _rms_norm_backward(gradient: Any, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    s, weight, rstd = ctx.saved_tensors
    dx, dweight = gradient(s, weight, rstd, dy, None, ctx.needs_input_grad[1])
    return dx, rounded(dweight, weight, ctx.needs_input_grad[1])


def _keep_add_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], inputs[2], output[2])
    ctx.set_materialize_grads(False)


def _add_rms_norm_backward(
    gradient: Any, ctx: Any, dy: Tensor | None, dsum: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dy is None:  # only the sum was used
        return dsum, dsum, None
    s, weight, rstd = ctx.saved_tensors
    dx, dweight = gradient(s, weight, rstd, dy, dsum, ctx.needs_input_grad[2])
    return dx, dx if ctx.needs_input_grad[1] else None, rounded(dweight, weight, ctx.needs_input_grad[2])


_rms_norm = differentiable(
    "rms_norm", _rms_norm_forward, _rms_norm_gradient, _keep_rms_norm, _rms_norm_backward, inputs=2
)
_add_rms_norm = differentiable(
    "rms_norm",
    _add_rms_norm_forward,
    _rms_norm_gradient,
    _keep_add_rms_norm,
    _add_rms_norm_backward,
    inputs=3,
    results=2,
)
