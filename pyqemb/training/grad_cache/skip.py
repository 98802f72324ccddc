"""Skip the second pass of texts whose cached gradient is negligible. Legend: U sequences, E dimension."""

from typing import NamedTuple

import numpy as np
import torch

from pyqemb.training.grad_cache.passes import PassRecord, rechunk


class Skipped(NamedTuple):
    """Shares of all distinct texts, of their tokens, and of the summed norm of the cached gradients."""

    texts: float = 0.0
    tokens: float = 0.0
    norm: float = 0.0


def skip_small_gradients(
    record: PassRecord, cache_UE: torch.Tensor, share: float, budget: int
) -> tuple[PassRecord, torch.Tensor, Skipped]:
    """The record without the texts with the smallest cached gradients, in total at most `share` of the summed norm.

    The other texts are packed into new chunks of `budget` tokens. Texts of chunks that kept their graph stay.
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
    return *rechunk(record, cache_UE, np.setdiff1d(others, dropped), budget), skipped
