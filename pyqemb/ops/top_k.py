"""Exact nearest-neighbor search by dot product."""

import torch
from torch import Tensor

from pyqemb import _C
from pyqemb.ops.checks import integer, optional_tensor, tensor
from pyqemb.ops.common import native


def top_k(
    queries_BE: Tensor,
    documents_ME: Tensor,
    k: int,
    *,
    exclude: Tensor | None = None,
    ceiling: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k documents with the largest dot product for each query, without storing the [B, M] matrix.

    Args:
        queries_BE: [B, E] float32, bfloat16, float16 or float64.
        documents_ME: [M, E] of the same dtype.
        k: from 0 to M.
        exclude: [B, X] int64, documents to exclude for each query (-1 for none).
        ceiling: [B] float32; documents with a higher score are skipped (false negatives, when mining).

    Returns:
        scores [B, k] float32 and indices [B, k] int64, best first, equal scores by lower index; padded with -inf and
        -1. Documents with a NaN score are skipped. Not differentiable.

    Raises:
        TypeError: not a tensor, or of the wrong dtype. ValueError: k outside 0..M, incompatible shapes.

    Example:
        >>> scores, indices = pyqemb.ops.top_k(torch.eye(2), torch.tensor([[0.5, 0.0], [1.0, 0.2], [0.0, 1.0]]), 2)
        >>> indices.tolist()
        [[1, 0], [2, 1]]
    """
    op = "top_k"
    queries_BE, documents_ME = tensor(op, "queries", queries_BE), tensor(op, "documents", documents_ME)
    exclude, ceiling = optional_tensor(op, "exclude", exclude), optional_tensor(op, "ceiling", ceiling)
    for name, value in (("queries", queries_BE), ("documents", documents_ME)):
        if value.dim() != 2:
            raise ValueError(f"[{op}] {name} must have shape [rows, dim], got {list(value.shape)}")
    k = integer(op, "k", k)
    if not 0 <= k <= len(documents_ME):
        raise ValueError(f"[{op}] k must be from 0 to the number of documents, {len(documents_ME)}, got {k!s:.100}")
    if (
        ceiling is not None
        and ceiling.device.type == "cpu"
        and ceiling.is_floating_point()
        and bool(ceiling.isnan().any())
    ):
        raise ValueError(f"[{op}] ceiling must hold no NaN, got one at {int(ceiling.isnan().nonzero()[0, 0])}")
    exclude = None if exclude is None else exclude.contiguous()
    ceiling = None if ceiling is None else ceiling.detach().contiguous()
    return _search(queries_BE.detach().contiguous(), documents_ME.detach().contiguous(), k, exclude, ceiling)


def _new_results(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    size = len(queries), k
    return queries.new_empty(size, dtype=torch.float32), queries.new_empty(size, dtype=torch.int64)


@native(
    "top_k(Tensor queries, Tensor documents, SymInt k, Tensor? exclude, Tensor? ceiling) -> (Tensor, Tensor)",
    lambda queries, documents, k, exclude, ceiling: _new_results(queries, k),
)
def _search(
    queries: Tensor, documents: Tensor, k: int, exclude: Tensor | None, ceiling: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores, indices = _new_results(queries, k)
    _C.top_k(queries, documents, exclude, ceiling, scores, indices)
    return scores, indices
