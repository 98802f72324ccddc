"""The contrastive loss over huge batches: loss and gradients in one sweep, the score matrix never exists."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyqemb import _C
from pyqemb.ops.common import arithmetic, checked, differentiable, empty, native

_DOC_MASK = {"query_document": 0, "own": 1, "none": 2}


@dataclass(frozen=True)
class Groups:
    """Which candidates stand beside the positive in one softmax, and whether the margin masks them."""

    hard: bool = True
    in_batch: bool = True
    query_query: bool = True
    doc_doc: bool = True
    margin: bool = True


PRESETS = {
    "qwen3": Groups(),  # Qwen3 Embedding, equation 1: all five groups
    "qwen3_stage2": Groups(query_query=False, doc_doc=False),  # Qwen3-VL-Embedding, section 5.1: query-document only
    "mnrl": Groups(query_query=False, doc_doc=False, margin=False),  # multiple negatives ranking loss
    "classification": Groups(in_batch=False, query_query=False, doc_doc=False, margin=False),  # own wrong labels only
}


def info_nce(
    queries_BE: Tensor,
    documents_ME: Tensor,
    positive: Tensor,
    *,
    owner: Tensor | None = None,
    document_ids: Tensor | None = None,
    preset: str = "qwen3",
    temperature: float = 0.02,
    margin: float | None = 0.1,
    doc_mask: str = "query_document",
    matryoshka: Sequence[int] | None = None,
    return_stats: bool = False,
) -> Any:
    """Mean over queries of -log(exp(s_i / tau) / Z_i), s the dot product of unit vectors, differentiable once.

    Z_i sums exp(score / tau) over the positive and, as the preset says: the query's own hard negatives (q_i, d), the documents
    of others in the batch (q_i, d), the other queries (q_i, q_j), and the documents of others against the positive (d_i+, d).
    A candidate is left out where its score exceeds s_i + margin, or where its text equals the positive's.

    Args:
        queries_BE: [B, E] unit vectors, float32, bfloat16, float16 or float64. Logits are float32 (float64 for float64).
        documents_ME: [M, E] of the same dtype; positives, hard negatives, anything else.
        positive: [B] int64, the index of each query's positive among the documents. Queries may share one.
        owner: [M] int64, the query that a document belongs to (its positive, or its own hard negative), -1 for none.
        document_ids: [M] int64, equal where texts are equal. In the query-query group, queries whose positives are equal
            texts leave each other out as well.
        preset: qwen3, qwen3_stage2, mnrl or classification.
        temperature: tau > 0.
        margin: None switches the margin off for any preset.
        doc_mask: which score the margin looks at in the document-document group: "query_document" is (q_i, d_j), equation 1
            read literally; "own" is (d_i+, d_j); "none".
        matryoshka: dimensions whose prefixes, normalised again, are averaged into the loss, e.g. [1024, 256].
        return_stats: also return {"positive", "negative", "masked"}: mean score of positives, of the query-document
            candidates kept, and the share of candidates left out. On a GPU the host waits for them where they are read.

    Returns:
        The loss, a scalar tensor in the arithmetic dtype; with return_stats a pair (loss, mapping). No queries: 0.

    Raises:
        TypeError: not a tensor, or of the wrong dtype. ValueError: an unknown preset, shapes that do not fit, an index out of
        range (not looked at on a GPU: `positive` must be right there), a temperature that is not positive and finite, Matryoshka dimensions outside 1..E.

    Source: Qwen3 Embedding technical report (arXiv 2506.05176), equation 1.
    """
    if preset not in PRESETS:
        raise ValueError(f"[info_nce] preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if doc_mask not in _DOC_MASK:
        raise ValueError(f"[info_nce] doc_mask must be one of {', '.join(_DOC_MASK)}, got {doc_mask!r}")
    checked("info_nce", "queries", queries_BE), checked("info_nce", "documents", documents_ME)
    groups = PRESETS[preset]
    bound = float(margin) if groups.margin and margin is not None else math.inf
    differs = torch.is_grad_enabled() and (queries_BE.requires_grad or documents_ME.requires_grad)
    kinds = groups.hard, groups.in_batch, groups.query_query, groups.doc_doc
    fixed = (positive, owner, document_ids, *kinds, bound, _DOC_MASK[doc_mask], float(temperature), differs)
    if matryoshka is None:
        loss, totals, _, _ = _info_nce(queries_BE.contiguous(), documents_ME.contiguous(), *fixed)
    else:
        dims = _checked_dims(matryoshka, queries_BE)
        parts = [_info_nce(_prefix(queries_BE, dim), _prefix(documents_ME, dim), *fixed) for dim in dims]
        loss, totals = torch.stack([part[0] for part in parts]).mean(), parts[dims.index(max(dims))][1]
    return (loss, Stats(totals, queries_BE.shape[0])) if return_stats else loss


class Stats(Mapping[str, float]):
    """The statistics of one call, fetched from the device when they are first read."""

    def __init__(self, totals: Tensor, num_queries: int):
        self._totals, self._num_queries = totals, num_queries

    @cached_property
    def _values(self) -> dict[str, float]:
        positive, negative, count, kept, dropped = self._totals.tolist()
        return {
            "positive": positive / max(self._num_queries, 1),
            "negative": negative / count if count else 0.0,
            "masked": dropped / (kept + dropped) if kept + dropped else 0.0,
        }

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _new_gradients(queries: Tensor, documents: Tensor, differs: bool) -> list[Tensor]:
    shapes = [x.shape if differs else (0,) for x in (queries, documents)]
    return [empty(shape, arithmetic(queries.dtype), queries.device) for shape in shapes]


@native(
    "info_nce(Tensor queries, Tensor documents, Tensor positive, Tensor? owner, Tensor? ids, bool hard, bool in_batch,"
    " bool query_query, bool doc_doc, float margin, int doc_mask, float temperature, bool differs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda queries, documents, *fixed: (
        queries.new_empty((), dtype=arithmetic(queries.dtype)),
        queries.new_empty(5, dtype=torch.float64),
        *(x.new_empty(x.shape if fixed[-1] else (0,), dtype=arithmetic(x.dtype)) for x in (queries, documents)),
    ),
)
def _forward(
    queries: Tensor, documents: Tensor, positive: Tensor, owner: Tensor | None, ids: Tensor | None,
    hard: bool, in_batch: bool, query_query: bool, doc_doc: bool, margin: float, doc_mask: int, temperature: float,
    differs: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    losses, totals = (queries.new_empty(size, dtype=torch.float64) for size in (queries.shape[:1], 5))
    d_queries, d_documents = _new_gradients(queries, documents, differs)
    _C.info_nce(
        queries, documents, positive, owner, ids, losses, totals,
        d_queries if differs else None, d_documents if differs else None,
        hard, in_batch, query_query, doc_doc, margin, doc_mask, temperature,
    )  # fmt: skip
    loss = (losses.sum() / max(len(losses), 1)).to(arithmetic(queries.dtype))
    return loss, totals, d_queries, d_documents


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype


def _backward(_: Any, ctx: Any, d_loss: Tensor | None, *__: Any) -> tuple[Tensor | None, ...]:
    grads = (None, None) if d_loss is None else ((g * d_loss).to(ctx.dtype) for g in ctx.saved_tensors)
    return *grads, *(None,) * 11


_info_nce = differentiable("info_nce", _forward, None, _keep, _backward)


def _checked_dims(matryoshka: Sequence[int], queries_BE: Tensor) -> list[int]:
    dims = [int(dim) for dim in matryoshka]
    size = queries_BE.shape[-1]
    if not dims or any(dim < 1 or dim > size for dim in dims):
        raise ValueError(f"[info_nce] matryoshka must list dimensions from 1 to {size}, got {list(matryoshka)}")
    return dims


def _prefix(vectors: Tensor, dim: int) -> Tensor:
    return vectors if dim == vectors.shape[-1] else torch.nn.functional.normalize(vectors[:, :dim], dim=-1)
