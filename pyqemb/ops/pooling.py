"""Packed hidden states -> one vector per sequence."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyqemb import _C
from pyqemb.ops.attention import _last_contiguous, _on_host, arithmetic


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
    cut = hidden_TE.shape[-1] if dim is None and isinstance(hidden_TE, Tensor) and hidden_TE.dim() else dim
    return _Pool.apply(hidden_TE, norm_weight, _on_host(cu_seqlens), eps, cut, normalize)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor | None, cu: Tensor, eps: float, dim: int, normalize: bool) -> Tensor:
        if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
            raise ValueError(f"[last_token_pool] dim must be a positive integer, got {dim!r}")
        hidden = _last_contiguous(hidden)
        rows = max(len(cu) - 1, 0) if isinstance(cu, Tensor) and cu.dim() == 1 else 0
        out = torch.empty((rows, dim), dtype=getattr(hidden, "dtype", None), device=getattr(hidden, "device", None))
        _C.pool_forward(hidden, cu, weight, out, eps, normalize)
        ctx.save_for_backward(hidden, weight, cu)
        ctx.eps, ctx.normalize = eps, normalize
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, cu = ctx.saved_tensors
        dhidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        dweight = None
        if weight is not None and ctx.needs_input_grad[1]:
            dweight = torch.empty(weight.shape, dtype=arithmetic(weight.dtype), device=weight.device)
        _C.pool_backward(hidden, cu, weight, dout.contiguous(), dhidden, dweight, ctx.eps, ctx.normalize)
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None, None, None
