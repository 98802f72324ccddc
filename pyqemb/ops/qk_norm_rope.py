"""RMSNorm of each head and the rotary embedding: one pass over memory forward and one backward."""

from typing import Any

from torch import Tensor

from pyqemb import _C
from pyqemb.ops.checks import not_negative, tensor
from pyqemb.ops.common import differentiable, empty_like, native, new, new_gradient, new_rows, rounded


def qk_norm_rope(x_TND: Tensor, norm_weight: Tensor, cos_TH: Tensor, sin_TH: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm of each head, then the rotary embedding, as Qwen3 applies to q and k; differentiable once.

    Args:
        x_TND: [T, N, D] float32, bfloat16, float16 or float64, D even.
        norm_weight: [D] of the same dtype.
        cos_TH: [T, D / 2], the cosines of each token's angles, float32 (float64 for float64); feature i turns with
            feature i + D / 2.
        sin_TH: [T, D / 2], their sines.
        eps: added to the mean square of the RMSNorm.

    Returns:
        [T, N, D], dtype of x.

    Raises:
        TypeError: not a tensor, or of the wrong dtype. ValueError: incompatible shapes, a negative eps.

    Example:
        >>> x_TND, angles_TH = torch.randn(3, 2, 4), torch.arange(3.0)[:, None] * torch.tensor([1.0, 0.1])
        >>> pyqemb.ops.qk_norm_rope(x_TND, torch.ones(4), angles_TH.cos(), angles_TH.sin()).shape
        torch.Size([3, 2, 4])

    Source: Qwen3 technical report (arXiv 2505.09388), section 2; rotary embedding, Su et al. 2021, equation 34.
    """
    return _rotated("qk_norm_rope", x_TND, norm_weight, cos_TH, sin_TH, eps)


def rope(x_TND: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotary embedding without a norm, as in Llama and Qwen2; differentiable once.

    Args:
        x_TND: [T, N, D] float32, bfloat16, float16 or float64, D even.
        cos_TH: [T, D / 2], the cosines of each token's angles, float32 (float64 for float64); feature i turns with
            feature i + D / 2.
        sin_TH: [T, D / 2], their sines.

    Returns:
        [T, N, D], dtype of x.

    Raises:
        TypeError: not a tensor, or of the wrong dtype. ValueError: incompatible shapes.

    Example:
        >>> quarter_turn = torch.zeros(1, 1), torch.ones(1, 1)  # cosine and sine of 90 degrees
        >>> pyqemb.ops.rope(torch.tensor([[[1.0, 0.0]]]), *quarter_turn)
        tensor([[[0., 1.]]])

    Source: Su et al. 2021, equation 34.
    """
    return _rotated("rope", x_TND, None, cos_TH, sin_TH, 0.0)


def _rotated(op: str, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    if op == "qk_norm_rope":
        weight = tensor(op, "norm_weight", weight)
    x, cos, sin = tensor(op, "x", x), tensor(op, "cos", cos), tensor(op, "sin", sin)
    return _qk_norm_rope(x.contiguous(), weight, cos, sin, not_negative(op, "eps", eps))


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


def _qk_norm_rope_backward(gradient: Any, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: under activation checkpointing each access recomputes them
    dx, dweight = gradient(*saved, dy, ctx.needs_input_grad[1])
    return dx, rounded(dweight, saved[1], ctx.needs_input_grad[1])


_qk_norm_rope = differentiable(
    "qk_norm_rope", _qk_norm_rope_forward, _qk_norm_rope_gradient, _keep_qk_norm_rope, _qk_norm_rope_backward, inputs=2
)
