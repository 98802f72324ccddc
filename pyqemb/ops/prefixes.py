"""Matryoshka: the prefix dimensions of a loss, and the sum of a loss over prefixes."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyqemb.ops import checks


def is_ordered(dims: Sequence[int]) -> bool:
    """Whether there are Matryoshka dimensions, all at least 1 and strictly ascending or descending."""
    rising = sorted(set(dims))
    return bool(rising) and rising[0] >= 1 and list(dims) in (rising, rising[::-1])


def prefixes(
    matryoshka: Sequence[int] | None, weights: Sequence[float] | None, size: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The dimensions in ascending order, and the weights of their losses."""
    if matryoshka is None:
        if weights is not None:
            raise ValueError("[info_nce] matryoshka_weights need matryoshka, got None")
        return (), ()
    given = checks.items("info_nce", "matryoshka", matryoshka, "dimensions")
    dims = [checks.integer("info_nce", f"matryoshka[{at}]", dim) for at, dim in enumerate(given)]
    if not dims or any(dim < 1 or dim > size for dim in dims):
        raise ValueError(f"[info_nce] matryoshka must list dimensions from 1 to {size}, got {list(matryoshka)}")
    if not is_ordered(dims):
        raise ValueError(f"[info_nce] matryoshka must rise or fall, each dimension once, got {list(matryoshka)}")
    prefix_weights = [1 / len(dims)] * len(dims)
    if weights is not None:
        given = checks.items("info_nce", "matryoshka_weights", weights, "numbers")
        prefix_weights = [
            checks.number("info_nce", f"matryoshka_weights[{at}]", weight) for at, weight in enumerate(given)
        ]
    if len(prefix_weights) != len(dims) or not all(math.isfinite(weight) and weight >= 0 for weight in prefix_weights):
        raise ValueError(f"[info_nce] matryoshka_weights must be {len(dims)} numbers of at least 0, got {weights}")
    pairs = sorted(zip(dims, prefix_weights, strict=True))
    return tuple(dim for dim, _ in pairs), tuple(weight for _, weight in pairs)


def unit_rows(x: Tensor) -> Tensor:
    """Rows normalized to length 1, at any magnitude; a row of zeros stays zero, and so does its gradient."""
    largest = x.detach().abs().amax(dim=-1, keepdim=True) if x.shape[-1] else x.new_ones(1)
    scaled = x / torch.where(largest > 0, largest, 1)
    norms = scaled.norm(dim=-1, keepdim=True)
    return scaled / norms.masked_fill(norms == 0, torch.inf)


def over_prefixes(
    loss: Callable[..., Tensor], dims: Sequence[int], weights: Sequence[float], *vectors: Tensor
) -> Tensor:
    """The weighted sum of `loss` over the prefixes of the vectors, normalized again; one call for each prefix."""
    parts = [
        weight * loss(*(unit_rows(x[:, :dim]) for x in vectors)) for dim, weight in zip(dims, weights, strict=True)
    ]
    return torch.stack(parts).sum()
