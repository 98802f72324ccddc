"""Packed hidden states -> one vector per sequence."""

from typing import Any

import torch
from torch import Tensor

from pyqemb import _C
from pyqemb.ops.common import arithmetic, checked, differentiable_once, on_host


def last_token_pool(
    hidden_TE: Tensor,
    cu_seqlens: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    dim: int | None = None,
    normalize: bool = True,
) -> Tensor:
    """The last token of each sequence -> RMSNorm -> first `dim` features -> L2 norm, in one pass, differentiable once.

    Args:
        hidden_TE: [T, E] float32, bfloat16, float16 or float64.
        cu_seqlens: [B + 1] int32, `[0, ..., T]`. The pooled token is the last of each sequence, never searched for.
        norm_weight: [E] of the final RMSNorm (over all E features, before the cut); None: hidden_TE is already normed.
        eps: of the RMSNorm.
        dim: features kept (Matryoshka); E when None.
        normalize: divide by the L2 norm (floor 1e-12).

    Returns:
        [B, dim], dtype of hidden_TE. A sequence without tokens gives zeros.

    Raises:
        TypeError: not a tensor, or of the wrong dtype. ValueError: dim outside 1..E, shapes or cu_seqlens that do not fit.

    Source: Qwen3 Embedding technical report (arXiv 2506.05176), section 2; Matryoshka, Kusupati et al. 2022.
    """
    checked("last_token_pool", "hidden", hidden_TE)
    if hidden_TE.dim() != 2:
        raise ValueError(f"[last_token_pool] hidden must have shape [tokens, embed], got {list(hidden_TE.shape)}")
    cut = hidden_TE.shape[1] if dim is None else dim
    if not isinstance(cut, int) or isinstance(cut, bool) or cut < 1:
        raise ValueError(f"[last_token_pool] dim must be a positive integer, got {dim!r}")
    return _Pool.apply(
        hidden_TE, norm_weight, on_host("last_token_pool", "cu_seqlens", cu_seqlens), eps, cut, normalize
    )


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, cu: Tensor, eps: float, dim: int, normalize: bool
    ) -> Tensor:
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        out = torch.empty((max(cu.numel() - 1, 0), dim), dtype=hidden.dtype, device=hidden.device)
        _C.pool_forward(hidden, cu, weight, out, eps, normalize)
        ctx.save_for_backward(hidden, weight, cu)
        ctx.eps, ctx.normalize = eps, normalize
        return out

    @staticmethod
    @differentiable_once("last_token_pool")
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, cu = ctx.saved_tensors
        dhidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        dweight = None
        if weight is not None and ctx.needs_input_grad[1]:
            dweight = torch.empty(weight.shape, dtype=arithmetic(weight.dtype), device=weight.device)
        _C.pool_backward(hidden, cu, weight, dout.contiguous(), dhidden, dweight, ctx.eps, ctx.normalize)
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None, None, None
