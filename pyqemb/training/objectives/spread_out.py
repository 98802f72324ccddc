"""The spread-out regularizer: vectors of unrelated texts should have a cosine near 0.

Legend: S texts of this rank, N texts of all ranks, E dimension.
"""

from typing import Any

import torch
from torch import Tensor

from pyqemb.training.parallel.world import World


def spread_out(own_SE: Tensor, counts_S: Tensor, number: int, world: World) -> Tensor:
    """This rank's part of the mean squared dot product of different vectors; the parts of all ranks are summed.

    sum_ij (v_i . v_j)^2 is the squared Frobenius norm of V^T V, [E, E], so no score matrix is computed and no vectors
    are gathered. A part may be below 0 if there are several ranks.

    Args:
        own_SE: [S, E] the vectors of this rank's texts; S may be 0.
        counts_S: [S] how often each counts. A vector that counts n times is n vectors.
        number: N, the sum of the counts of all ranks.
        world: the ranks.

    Returns:
        A scalar in float32 (float64 for float64), differentiable. 0 if N is below 2.

    Source: Zhang et al. 2017 (arXiv 1708.06320), the second moment; EmbeddingGemma (arXiv 2509.20354), section 2.
    """
    part: Tensor = _SpreadOut.apply(own_SE, counts_S, number, world)
    return part


class _SpreadOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_SE: Tensor, counts_S: Tensor, number: int, world: World) -> Tensor:
        wide = torch.float64 if own_SE.dtype == torch.float64 else torch.float32
        vectors_SE, counts_S1 = own_SE.to(wide), counts_S.to(own_SE.device, wide)[:, None]
        own_EE = vectors_SE.T @ (counts_S1 * vectors_SE)
        gram_EE = world.all_reduce_(own_EE.clone())
        squared_S1 = vectors_SE.square().sum(dim=1, keepdim=True)
        scale = 1 / (number * (number - 1)) if number > 1 else 0.0
        ctx.save_for_backward(vectors_SE, counts_S1, gram_EE, squared_S1)
        ctx.scale, ctx.dtype = scale, own_SE.dtype
        return scale * ((own_EE * gram_EE).sum() - (counts_S1 * squared_S1.square()).sum())

    @staticmethod
    def backward(ctx: Any, d_part: Tensor) -> tuple[Tensor, None, None, None]:
        vectors_SE, counts_S1, gram_EE, squared_S1 = ctx.saved_tensors
        gradient_SE = 4 * ctx.scale * counts_S1 * (vectors_SE @ gram_EE - squared_S1 * vectors_SE)
        return (d_part * gradient_SE).to(ctx.dtype), None, None, None
