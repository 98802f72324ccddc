"""Search for the best documents of each query: exact with ops.top_k, approximate with faiss."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pyqemb import ops
from pyqemb.errors import ConfigError

# (queries [B, E], excluded [B, X] with -1 for none, ceilings [B], k) -> scores [B, k], indices [B, k] padded with -1
Search = Callable[[np.ndarray, np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
# faiss supports neither ceilings nor excluded documents; if too few remain, the search is repeated with this many times
# as many
_MORE = 4


def exact(documents: np.ndarray, device: torch.device) -> Search:
    """Search all `documents`, float32 [M, E], by dot product on `device`."""
    pool = torch.from_numpy(documents).to(device)

    def search(
        queries: np.ndarray, excluded: np.ndarray, ceilings: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        asked, exclude, ceiling = (
            torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in (queries, excluded, ceilings)
        )
        scores, indices = ops.top_k(asked, pool, min(k, len(pool)), exclude=exclude, ceiling=ceiling)
        return scores.cpu().numpy(), indices.cpu().numpy()

    return search


def approximate(documents: np.ndarray, factory: str) -> Search:
    """Search with an index of faiss's index_factory, e.g. "HNSW32" or "IVF1024,Flat".

    Some of the best documents are missed; scores are those of the index.
    """
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ConfigError("approximate search needs faiss: pip install 'pyqemb[mine]'") from error
    try:
        index: Any = faiss.index_factory(documents.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(f"approximate: faiss knows no index {factory!r}") from error
    if not index.is_trained:
        index.train(documents)
    index.add(documents)

    def search(
        queries: np.ndarray, excluded: np.ndarray, ceilings: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        found = np.full((len(queries), k), -1, dtype=np.int64)
        short, wanted = np.arange(len(queries)), k + excluded.shape[1]
        while len(short):
            wanted = min(wanted, len(documents))
            values, indices = index.search(np.ascontiguousarray(queries[short]), wanted)
            good = (indices >= 0) & (values <= ceilings[short, None])
            for column in excluded[short].T:
                good &= indices != column[:, None]
            order = np.argsort(~good, axis=1, kind="stable")[:, :k]  # qualifying documents first, in order
            good = np.take_along_axis(good, order, axis=1)
            found[short[:, None], np.arange(order.shape[1])] = np.where(
                good, np.take_along_axis(indices, order, axis=1), -1
            )
            scores[short[:, None], np.arange(order.shape[1])] = np.where(
                good, np.take_along_axis(values, order, axis=1), -np.inf
            )
            if wanted == len(documents):
                break
            short, wanted = short[good.sum(axis=1) < k], _MORE * wanted
        return scores, found

    return search
