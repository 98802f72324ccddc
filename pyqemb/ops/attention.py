"""Attention over packed sequences."""

from typing import Any

import torch
from torch import Tensor

from pyqemb import _C
from pyqemb.ops.common import arithmetic, checked, differentiable_once, empty_like, on_host


def varlen_attention(
    q_TND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v within each sequence of a packed batch, with grouped-query heads, differentiable once.

    Args:
        q_TND: [T, N, D] float32, bfloat16, float16 or float64; D a multiple of 8 up to 256, contiguous; tokens and heads may
            be strided (slices of one qkv projection).
        k_SKD, v_SKD: [S, K, D] of the same dtype; N a multiple of K, query head n reads key head n // (N // K).
        cu_seqlens: [B + 1] int32, `[0, ..., T]`, where each sequence starts.
        cu_seqlens_k: the same for the keys, `[0, ..., S]`; None where queries and keys are the same tokens.
        causal: query i of n sees key j of m when j <= i + m - n (aligned to the bottom right). False: all keys.
        scale: 1 / sqrt(D) when None.

    Returns:
        [T, N, D], dtype of q. Arithmetic is float32 (float64 for float64). A query without keys gives zeros. The result for a
        sequence has the same bits whatever else is in the batch and however many threads run.

    Raises:
        TypeError: not a tensor, or of the wrong dtype. ValueError: shapes, head counts or cu_seqlens that do not fit.

    Source: Dao et al. 2022 (FlashAttention), algorithms 1 and 4; grouped heads, Ainslie et al. 2023.
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    if scale is None:  # a q that has no head dimension is refused below
        scale = q_TND.shape[-1] ** -0.5 if isinstance(q_TND, Tensor) and q_TND.dim() and q_TND.shape[-1] else 1.0
    starts = (
        on_host("varlen_attention", name, cu)
        for name, cu in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k))
    )
    return _Attention.apply(q_TND, k_SKD, v_SKD, *starts, causal, float(scale))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float
    ) -> Tensor:
        q, k, v = (_last_contiguous(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
        out = empty_like(q)
        lse = torch.empty(q.shape[:-1], dtype=arithmetic(q.dtype), device=q.device)
        _C.attention_forward(q, k, v, cu_q, cu_k, out, lse, scale, causal)
        ctx.save_for_backward(q, k, v, cu_q, cu_k, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @differentiable_once("varlen_attention")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cu_q, cu_k, out, lse = ctx.saved_tensors
        dq, dk, dv = (empty_like(x) for x in (q, k, v))
        _C.attention_backward(q, k, v, cu_q, cu_k, out, lse, dout.contiguous(), dq, dk, dv, ctx.scale, ctx.causal)
        return dq, dk, dv, None, None, None, None


def _last_contiguous(name: str, x: Any) -> Tensor:
    checked("varlen_attention", name, x)
    return x.contiguous() if x.dim() and x.stride(-1) != 1 else x
