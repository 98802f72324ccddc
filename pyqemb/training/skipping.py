"""Leaving out of the second pass the texts whose gradient is negligible. Legend: U sequences, E dimension."""

from typing import NamedTuple

import numpy as np
import torch

from pyqemb.training.passes import Record, cut_again


class Skipped(NamedTuple):
    """Shares of all distinct texts, of their tokens, and of the summed norm of the cached gradients."""

    texts: float = 0.0
    tokens: float = 0.0
    norm: float = 0.0


def without_the_least(
    record: Record, cache_UE: torch.Tensor, share: float, budget: int
) -> tuple[Record, torch.Tensor, Skipped]:
    """The record without the texts whose cached gradients are smallest: together at most `share` of the summed norm.

    The others are cut anew by `budget` tokens. Texts of chunks that kept their graph stay.
    """
    norms = torch.linalg.vector_norm(cache_UE.double(), dim=1).cpu().numpy()
    lengths = np.concatenate([chunk.lengths for chunk in record.chunks])
    kept = np.concatenate([record.rows(number) for number in record.graphs]) if record.graphs else np.empty(0, np.int64)
    others = np.setdiff1d(np.arange(len(norms)), kept)
    ascending = others[np.argsort(norms[others], kind="stable")]
    dropped = ascending[: np.searchsorted(np.cumsum(norms[ascending]), share * norms.sum(), side="right")]
    if not len(dropped):
        return record, cache_UE, Skipped()
    norm = float(norms[dropped].sum() / norms.sum()) if norms.any() else 0.0
    skipped = Skipped(len(dropped) / len(norms), float(lengths[dropped].sum() / max(lengths.sum(), 1)), norm)
    return *cut_again(record, cache_UE, np.setdiff1d(others, dropped), budget), skipped
