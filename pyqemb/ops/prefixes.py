"""Matryoshka: the prefixes of the vectors that a loss is taken of, and a loss taken of each."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


def prefixes(
    matryoshka: Sequence[int] | None, weights: Sequence[float] | None, size: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Dimensions, rising, and the weights of their losses."""
    if matryoshka is None:
        if weights is not None:
            raise ValueError("[info_nce] matryoshka_weights need matryoshka, got None")
        return (), ()
    dims = [int(dim) for dim in matryoshka]
    if not dims or any(dim < 1 or dim > size for dim in dims):
        raise ValueError(f"[info_nce] matryoshka must list dimensions from 1 to {size}, got {list(matryoshka)}")
    rising = sorted(set(dims))
    if dims not in (rising, rising[::-1]):
        raise ValueError(f"[info_nce] matryoshka must rise or fall, each dimension once, got {list(matryoshka)}")
    shares = [1 / len(dims)] * len(dims) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(dims) or not all(math.isfinite(share) and share >= 0 for share in shares):
        raise ValueError(f"[info_nce] matryoshka_weights must be {len(dims)} numbers of at least 0, got {weights}")
    pairs = sorted(zip(dims, shares, strict=True))
    return tuple(dim for dim, _ in pairs), tuple(share for _, share in pairs)


def over_prefixes(
    loss: Callable[..., Tensor], dims: Sequence[int], weights: Sequence[float], *vectors: Tensor
) -> Tensor:
    """The weighted sum of a loss over the prefixes of the vectors, normalised again; one call each, in order."""
    parts = [
        weight * loss(*(normalize(x[:, :dim], dim=-1) for x in vectors))
        for dim, weight in zip(dims, weights, strict=True)
    ]
    return torch.stack(parts).sum()
