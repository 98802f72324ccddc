"""The elementwise parts of a Qwen3 layer, each one pass over memory forward and one backward."""

from typing import Any

from torch import Tensor

from pyqemb import _C
from pyqemb.ops.checks import not_negative, tensor
from pyqemb.ops.common import differentiable, empty_like, native, new, new_gradient, new_rows


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Tensor | None = None) -> Any:
    """x / rms(x) * weight over the last dimension, differentiable once.

    Args:
        x: [..., E] float32, bfloat16, float16 or float64; weight: [E] of the same dtype; eps: added to the mean square.
        residual: of the shape and dtype of x; what is normed is then x + residual, rounded to that dtype.

    Returns:
        The shape and dtype of x; arithmetic is float32 (float64 for float64). With a residual a pair (normed, x + residual).

    Raises:
        TypeError: not a tensor, or of the wrong dtype. ValueError: shapes that do not fit, a negative eps.

    Source: Zhang and Sennrich 2019, equation 4.
    """
    op = "rms_norm"
    x, weight, eps = tensor(op, "x", x), tensor(op, "weight", weight), not_negative(op, "eps", eps)
    if not x.dim():
        raise ValueError("[rms_norm] x must have shape [..., size], got []")
    if residual is None:
        return _rms_norm(_rows(x), weight, eps)[0].view(x.shape)
    residual = tensor(op, "residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"[rms_norm] residual must have the shape of x, {list(x.shape)}, got {list(residual.shape)}")
    normed, _, total = _add_rms_norm(_rows(x), _rows(residual), weight, eps)
    return normed.view(x.shape), total.view(x.shape)


def qk_norm_rope(x_TND: Tensor, norm_weight: Tensor, cos_TH: Tensor, sin_TH: Tensor, eps: float = 1e-6) -> Tensor:
    """What Qwen3 does to q and to k before attention: RMSNorm of each head, then rotary embedding; differentiable once.

    Args:
        x_TND: [T, N, D] float32, bfloat16, float16 or float64, D even.
        norm_weight: [D] of the same dtype.
        cos_TH, sin_TH: [T, D / 2] of each token's angles, float32 (float64 for float64); feature i turns with i + D / 2.
        eps: of the RMSNorm.

    Returns:
        [T, N, D], dtype of x.

    Raises:
        TypeError: not a tensor, or of the wrong dtype. ValueError: shapes that do not fit, a negative eps.

    Source: Qwen3 technical report (arXiv 2505.09388), section 2; rotary embedding, Su et al. 2021, equation 34.
    """
    return _rotated("qk_norm_rope", x_TND, norm_weight, cos_TH, sin_TH, eps)


def rope(x_TND: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """The rotary embedding alone, as in Llama and Qwen2: `qk_norm_rope` without its norm.

    Source: Su et al. 2021, equation 34.
    """
    return _rotated("rope", x_TND, None, cos_TH, sin_TH, 0.0)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element, differentiable once.

    Both of one shape and dtype (float32, bfloat16, float16 or float64). TypeError and ValueError as above.

    Source: Shazeer 2020, equation 6.
    """
    gate, up = tensor("swiglu", "gate", gate), tensor("swiglu", "up", up)
    return _swiglu(gate.contiguous(), up.contiguous())


def _rotated(op: str, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    if op == "qk_norm_rope":
        weight = tensor(op, "norm_weight", weight)
    x, cos, sin = tensor(op, "x", x), tensor(op, "cos", cos), tensor(op, "sin", sin)
    return _qk_norm_rope(x.contiguous(), weight, cos, sin, not_negative(op, "eps", eps))[0]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _rounded(dweight: Tensor, weight: Tensor, wanted: bool) -> Tensor | None:
    return dweight.to(weight.dtype) if wanted else None


@native(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", lambda x, weight, eps: (new(x), new_rows(x))
)
def _rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, rstd = empty_like(x), new_rows(x)
    _C.rms_norm_forward(x, None, weight, None, y, rstd, eps)
    return y, rstd


@native(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    lambda x, residual, weight, eps: (new(x), new_rows(x), new(x)),
)
def _add_rms_norm_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd, total = empty_like(x), new_rows(x), empty_like(x)
    _C.rms_norm_forward(x, residual, weight, total, y, rstd, eps)
    return y, rstd, total


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


def _rms_norm_backward(gradient: Any, ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    s, weight, rstd = ctx.saved_tensors
    dx, dweight = gradient(s, weight, rstd, dy, None, ctx.needs_input_grad[1])
    return dx, _rounded(dweight, weight, ctx.needs_input_grad[1]), None


def _keep_add_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2], inputs[2], output[1])
    ctx.set_materialize_grads(False)


def _add_rms_norm_backward(
    gradient: Any, ctx: Any, dy: Tensor | None, _: Any, dsum: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dy is None:  # only the sum was used
        return dsum, dsum, None, None
    s, weight, rstd = ctx.saved_tensors
    dx, dweight = gradient(s, weight, rstd, dy, dsum, ctx.needs_input_grad[2])
    return dx, dx if ctx.needs_input_grad[1] else None, _rounded(dweight, weight, ctx.needs_input_grad[2]), None


@native(
    "qk_norm_rope(Tensor x, Tensor? weight, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)",
    lambda x, weight, cos, sin, eps: (new(x), new_rows(x)),
)
def _qk_norm_rope_forward(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    y, rstd = empty_like(x), new_rows(x)
    _C.qk_norm_rope_forward(x, weight, cos, sin, y, rstd, eps)
    return y, rstd


@native(
    "qk_norm_rope_backward(Tensor x, Tensor? weight, Tensor cos, Tensor sin, Tensor rstd, Tensor dy, bool wanted)"
    " -> (Tensor, Tensor)",
    lambda x, weight, cos, sin, rstd, dy, wanted: (new(x), new_gradient(x if weight is None else weight, wanted)),
)
def _qk_norm_rope_gradient(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, rstd: Tensor, dy: Tensor, wanted: bool
) -> tuple[Tensor, Tensor]:
    dx, dweight = empty_like(x), new_gradient(x if weight is None else weight, wanted)
    _C.qk_norm_rope_backward(x, weight, cos, sin, rstd, dy.contiguous(), dx, dweight if wanted else None)
    return dx, dweight


def _keep_qk_norm_rope(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], output[1])


def _qk_norm_rope_backward(gradient: Any, ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: under checkpointing each reading computes them again
    dx, dweight = gradient(*saved, dy, ctx.needs_input_grad[1])
    return dx, _rounded(dweight, saved[1], ctx.needs_input_grad[1]), None, None, None


@native("swiglu(Tensor gate, Tensor up) -> Tensor", lambda gate, up: new(gate))
def _swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    y = empty_like(gate)
    _C.swiglu_forward(gate, up, y)
    return y


@native(
    "swiglu_backward(Tensor gate, Tensor up, Tensor dy) -> (Tensor, Tensor)", lambda gate, up, dy: (new(gate), new(up))
)
def _swiglu_gradient(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = empty_like(gate), empty_like(up)
    _C.swiglu_backward(gate, up, dy.contiguous(), dgate, dup)
    return dgate, dup


def _keep_swiglu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(gradient: Any, ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return gradient(*ctx.saved_tensors, dy)


_rms_norm = differentiable("rms_norm", _rms_norm_forward, _rms_norm_gradient, _keep_rms_norm, _rms_norm_backward)
_add_rms_norm = differentiable(
    "rms_norm", _add_rms_norm_forward, _rms_norm_gradient, _keep_add_rms_norm, _add_rms_norm_backward
)
_qk_norm_rope = differentiable(
    "qk_norm_rope", _qk_norm_rope_forward, _qk_norm_rope_gradient, _keep_qk_norm_rope, _qk_norm_rope_backward
)
_swiglu = differentiable("swiglu", _swiglu_forward, _swiglu_gradient, _keep_swiglu, _swiglu_backward)
