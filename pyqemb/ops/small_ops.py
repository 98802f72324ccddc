"""The elementwise parts of a Qwen3 layer, each one pass over memory forward and one backward."""

from typing import Any

import torch
from torch import Tensor

from pyqemb import _C
from pyqemb.ops.common import arithmetic, checked, differentiable_once, empty_like


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
    if not checked("rms_norm", "x", x).dim():
        raise ValueError("[rms_norm] x must have shape [..., size], got []")
    if residual is None:
        return _RmsNorm.apply(x.reshape(-1, x.shape[-1]), None, weight, eps)[0].view(x.shape)
    if checked("rms_norm", "residual", residual).shape != x.shape:
        raise ValueError(f"[rms_norm] residual must have the shape of x, {list(x.shape)}, got {list(residual.shape)}")
    flat = (value.reshape(-1, x.shape[-1]) for value in (x, residual))
    normed, total = _RmsNorm.apply(*flat, weight, eps)
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
    checked("qk_norm_rope", "x", x_TND)
    return _QkNormRope.apply(x_TND, norm_weight, cos_TH, sin_TH, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element, differentiable once.

    Both of one shape and dtype (float32, bfloat16, float16 or float64). TypeError and ValueError as above.

    Source: Shazeer 2020, equation 6.
    """
    checked("swiglu", "gate", gate), checked("swiglu", "up", up)
    return _Swiglu.apply(gate, up)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        x = x.contiguous()
        y, rstd = empty_like(x), torch.empty(x.shape[:1], dtype=arithmetic(x.dtype), device=x.device)
        total = None if residual is None else empty_like(x)
        _C.rms_norm_forward(x, None if residual is None else residual.contiguous(), weight, total, y, rstd, eps)
        ctx.save_for_backward(x if total is None else total, weight, rstd)
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @differentiable_once("rms_norm")
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        s, weight, rstd = ctx.saved_tensors
        if dy is None:  # only the sum was used
            return dsum, dsum, None, None
        dx, dweight = empty_like(s), _weight_gradient(weight, ctx.needs_input_grad[2])
        _C.rms_norm_backward(s, weight, rstd, dy.contiguous(), None if dsum is None else dsum.contiguous(), dx, dweight)
        dresidual = dx if ctx.needs_input_grad[1] else None
        return dx, dresidual, None if dweight is None else dweight.to(weight.dtype), None


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y = empty_like(x)
        rstd = torch.empty(x.shape[:2], dtype=arithmetic(x.dtype), device=x.device)
        _C.qk_norm_rope_forward(x, weight, cos, sin, y, rstd, eps)
        ctx.save_for_backward(x, weight, cos, sin, rstd)
        return y

    @staticmethod
    @differentiable_once("qk_norm_rope")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin, rstd = ctx.saved_tensors
        dx, dweight = empty_like(x), _weight_gradient(weight, ctx.needs_input_grad[1])
        _C.qk_norm_rope_backward(x, weight, cos, sin, rstd, dy.contiguous(), dx, dweight)
        return dx, None if dweight is None else dweight.to(weight.dtype), None, None, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = empty_like(gate)
        _C.swiglu_forward(gate, up, y)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @differentiable_once("swiglu")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = empty_like(gate), empty_like(up)
        _C.swiglu_backward(gate, up, dy.contiguous(), dgate, dup)
        return dgate, dup


def _weight_gradient(weight: Tensor, wanted: bool) -> Tensor | None:
    return torch.empty(weight.shape, dtype=arithmetic(weight.dtype), device=weight.device) if wanted else None
