"""Vectors as a search index stores them: truncated, quantized, and ordered again after the search.

Legend: B queries, M documents, K candidates, E features.
"""

from dataclasses import dataclass

import numpy as np
import torch

from pyqemb import ops
from pyqemb.data.arguments import Count, checked
from pyqemb.errors import ConfigError
from pyqemb.model.device import named_device
from pyqemb.model.quantize import bytes_per_vector, check_precision, dequantize, quantize, value_ranges

_BLOCK = 1 << 26  # gathered float32 values at a time


@dataclass(frozen=True)
class Storage:
    """How vectors are stored and searched.

    Args:
        precision: float32, int8, uint8, binary or ubinary, as in `pyqemb.model.quantize`. Queries and documents are
            quantized alike; the ranges of int8 and uint8 are those of the documents.
        rescore: the best `rescore` documents of each query are ordered again, by the dot product of the float32 query
            and the quantized document. None: they are not.

    Raises:
        ConfigError: an unknown precision; `rescore` with float32, or below 1.
    """

    precision: str = "float32"
    rescore: int | None = None

    def __post_init__(self) -> None:
        check_precision(self.precision)
        if self.rescore is None:
            return
        if isinstance(self.rescore, bool) or not isinstance(self.rescore, int) or self.rescore < 1:
            raise ConfigError(f"rescore must be a number of documents, at least 1, got {self.rescore!r}")
        if self.precision == "float32":
            raise ConfigError("rescore needs a quantized precision: int8, uint8, binary or ubinary; got float32")

    def stored(self, query_vectors: np.ndarray, document_vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The float32 vectors that the stored queries [B, E] and documents [M, E] represent."""
        if self.precision == "float32":
            return query_vectors, document_vectors
        ranges = value_ranges(document_vectors) if self.precision in ("int8", "uint8") else None
        first, second = (
            dequantize(quantize(x, self.precision, ranges), self.precision, x.shape[1], ranges)
            for x in (query_vectors, document_vectors)
        )
        return first, second

    def search(
        self,
        query_vectors: np.ndarray,
        document_vectors: np.ndarray,
        k: int,
        exclude: np.ndarray | None = None,
        device: torch.device | str = "cpu",
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (scores, indices) [B, min(k, M)] of the best documents of each query.

        Missing documents, where `exclude` leaves fewer, have index -1. Documents beyond the `rescore` best keep their
        order, after the others.

        Args:
            query_vectors: float32 [B, E].
            document_vectors: float32 [M, E].
            k: the number of documents per query.
            exclude: int64 [B, X], as in `rank`.
            device: the device of the search.
        """
        queries, documents = self.stored(query_vectors, document_vectors)
        depth = max(k, self.rescore or 0)
        scores, indices = rank(queries, documents, depth, exclude, device)
        if self.rescore is not None:
            best = rescored(query_vectors, documents, indices[:, : self.rescore])
            scores[:, : self.rescore], indices[:, : self.rescore] = best
        return scores[:, :k], indices[:, :k]

    def bytes(self, dim: int) -> int:
        """The size of a stored vector of `dim` features."""
        return bytes_per_vector(self.precision, dim)


@checked
def rank(
    query_vectors: np.ndarray,
    document_vectors: np.ndarray,
    k: Count = 100,
    exclude: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, indices) [B, min(k, M)] of the best documents of each query by dot product.

    Args:
        query_vectors: float32 [B, E].
        document_vectors: float32 [M, E].
        k: the number of documents per query (default 100).
        exclude: int64 [B, X], indices of documents to exclude for each query, padded with -1 (default: none).
        device: the device of the search (default "cpu").
    """
    place = named_device(device)
    queries, documents = (
        _matrix(name, x, np.floating, np.float32).to(place)
        for name, x in (("query_vectors", query_vectors), ("document_vectors", document_vectors))
    )
    if queries.shape[1] != documents.shape[1]:
        raise ConfigError(
            f"[rank] document_vectors must have the {queries.shape[1]} features of query_vectors, "
            f"got {documents.shape[1]}"
        )
    forbidden = None if exclude is None else _matrix("exclude", exclude, np.integer, np.int64).to(place)
    scores, indices = ops.top_k(queries, documents, min(k, len(documents)), exclude=forbidden)
    return scores.cpu().numpy(), indices.cpu().numpy()


def _matrix(name: str, array: np.ndarray, kind: type, dtype: type) -> torch.Tensor:
    if array.ndim != 2 or not np.issubdtype(array.dtype, kind):
        raise TypeError(
            f"[rank] {name} must be {kind.__name__} with two dimensions, got {array.dtype} of shape {[*array.shape]}"
        )
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))


def rescored(
    query_vectors: np.ndarray, document_vectors: np.ndarray, candidates: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Order the candidates [B, K] of each query by dot product, the lower index first if they are equal.

    Args:
        query_vectors: float32 [B, E].
        document_vectors: float32 [M, E].
        candidates: int64 [B, K], indices of documents, -1 for none.

    Returns:
        (scores, indices) [B, K]; -1 comes last, with the score -inf.
    """
    candidates = np.sort(candidates, axis=1)
    scores = np.empty(candidates.shape, dtype=np.float32)
    rows = max(1, _BLOCK // max(1, candidates.shape[1] * document_vectors.shape[1]))
    for start in range(0, len(candidates), rows):
        block = candidates[start : start + rows]
        gathered = document_vectors[block]  # -1 is the last document; its score is replaced
        scores[start : start + rows] = (gathered @ query_vectors[start : start + rows, :, None])[:, :, 0]
    scores[candidates < 0] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(candidates, order, axis=1)
