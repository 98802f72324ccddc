"""The contrastive loss over huge batches: loss and gradients in one sweep, the score matrix never exists."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyqemb import _C
from pyqemb.ops.common import arithmetic, checked, differentiable_once, empty

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
            candidates kept, and the share of candidates left out.

    Returns:
        The loss, a scalar tensor in the arithmetic dtype; with return_stats a pair (loss, dict). No queries: 0.

    Raises:
        TypeError: not a tensor, or of the wrong dtype. ValueError: an unknown preset, shapes that do not fit, an index out of
        range, a temperature that is not positive and finite, Matryoshka dimensions outside 1..E.

    Source: Qwen3 Embedding technical report (arXiv 2506.05176), equation 1.
    """
    if preset not in PRESETS:
        raise ValueError(f"[info_nce] preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if doc_mask not in _DOC_MASK:
        raise ValueError(f"[info_nce] doc_mask must be one of {', '.join(_DOC_MASK)}, got {doc_mask!r}")
    checked("info_nce", "queries", queries_BE), checked("info_nce", "documents", documents_ME)
    groups = PRESETS[preset]
    bound = float(margin) if groups.margin and margin is not None else math.inf
    fixed = (positive, owner, document_ids, groups, bound, _DOC_MASK[doc_mask], float(temperature))
    if matryoshka is None:
        loss, stats = _InfoNce.apply(queries_BE, documents_ME, *fixed)
    else:
        dims = _checked_dims(matryoshka, queries_BE)
        parts = [_InfoNce.apply(_prefix(queries_BE, dim), _prefix(documents_ME, dim), *fixed) for dim in dims]
        loss, stats = torch.stack([part for part, _ in parts]).mean(), parts[dims.index(max(dims))][1]
    return (loss, stats) if return_stats else loss


class _InfoNce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, documents: Tensor, positive: Tensor, owner: Tensor | None, ids: Tensor | None,
        groups: Groups, margin: float, doc_mask: int, temperature: float,
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        queries, documents = queries.contiguous(), documents.contiguous()
        losses = torch.empty(queries.shape[:1], dtype=torch.float64)
        d_queries = d_documents = None
        if any(ctx.needs_input_grad[:2]):
            d_queries, d_documents = (empty(x.shape, arithmetic(x.dtype), x.device) for x in (queries, documents))
        totals = _C.info_nce(
            queries, documents, positive, owner, ids, losses, d_queries, d_documents,
            groups.hard, groups.in_batch, groups.query_query, groups.doc_doc, margin, doc_mask, temperature,
        )  # fmt: skip
        ctx.save_for_backward(d_queries, d_documents)
        ctx.dtypes = queries.dtype, documents.dtype
        count = max(len(losses), 1)
        stats = {
            "positive": totals[0] / count,
            "negative": totals[1] / totals[2] if totals[2] else 0.0,
            "masked": totals[4] / (totals[3] + totals[4]) if totals[3] + totals[4] else 0.0,
        }
        return (losses.sum() / count).to(arithmetic(queries.dtype)), stats

    @staticmethod
    @differentiable_once("info_nce")
    def backward(ctx: Any, d_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grads = (
            None if g is None else (g * d_loss).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None, None, None, None


def _checked_dims(matryoshka: Sequence[int], queries_BE: Tensor) -> list[int]:
    dims = [int(dim) for dim in matryoshka]
    size = queries_BE.shape[-1]
    if not dims or any(dim < 1 or dim > size for dim in dims):
        raise ValueError(f"[info_nce] matryoshka must list dimensions from 1 to {size}, got {list(matryoshka)}")
    return dims


def _prefix(vectors: Tensor, dim: int) -> Tensor:
    return vectors if dim == vectors.shape[-1] else torch.nn.functional.normalize(vectors[:, :dim], dim=-1)
