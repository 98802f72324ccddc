"""One vector per sequence from packed hidden states."""

from typing import Any

from torch import Tensor

from pyqemb import _C
from pyqemb.ops.checks import flag, not_negative, optional_tensor, tensor
from pyqemb.ops.common import at_kernels, differentiable, native, new, new_gradient, rounded


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
        cu_seqlens: [B + 1] int32, `[0, ..., T]`. The pooled token is always the last of each sequence.
        norm_weight: [E] weight of the final RMSNorm (over all E features, before truncation); None: hidden_TE is
            already normalized.
        eps: added to the mean square of the RMSNorm.
        dim: number of features to keep (Matryoshka); E when None.
        normalize: divide by the L2 norm, at any magnitude. A row of zeros stays zero, and so does its gradient.

    Returns:
        [B, dim], dtype of hidden_TE. A sequence without tokens has a vector of zeros.

    Raises:
        TypeError: not a tensor, or of the wrong dtype. ValueError: dim outside 1..E, incompatible shapes or cu_seqlens.

    Example:
        >>> hidden_TE = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
        >>> pyqemb.ops.last_token_pool(hidden_TE, torch.tensor([0, 2, 3], dtype=torch.int32))
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]])

    Source: Qwen3 Embedding technical report (arXiv 2506.05176), section 2; Matryoshka, Kusupati et al. 2022.
    """
    op = "last_token_pool"
    hidden_TE, norm_weight = tensor(op, "hidden", hidden_TE), optional_tensor(op, "norm_weight", norm_weight)
    eps, normalize = not_negative(op, "eps", eps), flag(op, "normalize", normalize)
    if hidden_TE.dim() != 2:
        raise ValueError(f"[{op}] hidden must have shape [tokens, embed], got {list(hidden_TE.shape)}")
    cut = hidden_TE.shape[1] if dim is None else dim
    if dim is not None and (not isinstance(cut, int) or isinstance(cut, bool) or cut < 1):
        raise ValueError(f"[{op}] dim must be a positive integer, got {dim!r:.100}")
    if cut > hidden_TE.shape[1] or cut < 1:
        raise ValueError(f"[{op}] dim must be from 1 to {hidden_TE.shape[1]}, got {cut!s:.100}")
    cu_seqlens = at_kernels(op, "cu_seqlens", cu_seqlens, len(hidden_TE), "hidden", hidden_TE.device)
    hidden_TE = hidden_TE if hidden_TE.stride(1) == 1 else hidden_TE.contiguous()
    return _pool(hidden_TE, norm_weight, cu_seqlens, eps, cut, normalize)


def _new_vectors(hidden: Tensor, cu: Tensor, dim: int) -> Tensor:
    return hidden.new_empty(max(cu.numel() - 1, 0), dim)


@native(
    "last_token_pool(Tensor hidden, Tensor? weight, Tensor cu_seqlens, float eps, SymInt dim, bool normalize) -> "
    "Tensor",
    lambda hidden, weight, cu, eps, dim, normalize: _new_vectors(hidden, cu, dim),
)
def _forward(hidden: Tensor, weight: Tensor | None, cu: Tensor, eps: float, dim: int, normalize: bool) -> Tensor:
    out = _new_vectors(hidden, cu, dim)
    _C.last_token_pool_forward(hidden, cu, weight, out, eps, normalize)
    return out


@native(
    "last_token_pool_backward(Tensor hidden, Tensor? weight, Tensor cu_seqlens, Tensor dout, float eps, bool normalize,"
    " bool wanted) -> (Tensor, Tensor)",
    lambda hidden, weight, cu, dout, eps, normalize, wanted: (
        new(hidden),
        new_gradient(hidden if weight is None else weight, wanted),
    ),
)
def _gradient(
    hidden: Tensor, weight: Tensor | None, cu: Tensor, dout: Tensor, eps: float, normalize: bool, wanted: bool
) -> tuple[Tensor, Tensor]:
    dhidden = hidden.new_zeros(hidden.shape)
    dweight = new_gradient(hidden if weight is None else weight, wanted)
    _C.last_token_pool_backward(
        hidden, cu, weight, dout.contiguous(), dhidden, dweight if wanted else None, eps, normalize
    )
    return dhidden, dweight


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.eps, ctx.normalize = inputs[3], inputs[5]


def _backward(gradient: Any, ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, cu = ctx.saved_tensors
    wanted = weight is not None and ctx.needs_input_grad[1]
    dhidden, dweight = gradient(hidden, weight, cu, dout, ctx.eps, ctx.normalize, wanted)
    return dhidden, rounded(dweight, weight, wanted)


_pool = differentiable("last_token_pool", _forward, _gradient, _keep, _backward, inputs=2)
