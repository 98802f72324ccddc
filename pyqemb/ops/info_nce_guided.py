"""The sweep of InfoNCE with a guide's mask, in torch: blocks of rows against all columns, so memory is bounded.

It has the interface of `sweep`, for the two rounds of `info_nce_composed`. Legend: R rows of a block, C columns, S
softmaxes, E dimension, F dimension of the guide.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyqemb.ops.common import arithmetic
from pyqemb.ops.groups import Options
from pyqemb.ops.info_nce_sweep import Batch

_ELEMENTS = 1 << 21  # of a matrix of scores


class Guide(NamedTuple):
    """Unit vectors of another model, and the limit of its scores.

    A candidate is masked if its guide score exceeds that of the positive by more than `margin`, which `relative`
    multiplies by the absolute value of the positive's score.
    """

    queries: Tensor
    documents: Tensor
    margin: float
    relative: bool


class _Group(NamedTuple):
    """The candidates of a group in a block of rows, and their softmax."""

    logits_RC: Tensor  # float64, -inf where there is no candidate
    scores_RC: Tensor
    softmax: int
    is_query_document: bool
    num_masked: int


def guided_sweep(
    batch: Batch,
    options: Options,
    guide: Guide,
    *,
    first_row: int,
    num_rows: int,
    differs: bool,
    learns: bool,
    log_negatives: Tensor,
    log_negatives_given: bool = False,
    adds_positive: bool = False,
) -> tuple[Tensor, ...]:
    """What `sweep` returns: losses (0, or NaN if the positive is no document), totals and gradients.

    As there, log sums are written to `log_negatives`, or taken from it if they are given. The positive's own part of
    the gradient is never added.
    """
    assert not adds_positive
    queries, documents, positive = batch.queries, batch.documents, batch.positive
    dtype, tau = arithmetic(queries.dtype), options.temperature
    is_document = (positive >= 0) & (positive < len(documents))
    batch = batch._replace(
        queries=queries.to(dtype), documents=documents.to(dtype), positive=positive.clamp(0, len(documents) - 1)
    )
    losses = torch.zeros(num_rows, dtype=torch.float64, device=queries.device)
    losses[~is_document[first_row : first_row + num_rows]] = torch.nan
    totals, d_tau = losses.new_zeros(5), losses.new_zeros(1)
    d_queries, d_documents = (
        torch.zeros_like(x, dtype=dtype) if differs else x.new_empty(0, dtype=dtype) for x in (queries, documents)
    )
    if not log_negatives_given:
        log_negatives.fill_(-torch.inf)
    size = max(1, _ELEMENTS // max(len(queries), len(documents), 1))
    for start in range(0, num_rows, size):
        rows = slice(first_row + start, first_row + min(start + size, num_rows))
        out = slice(start, start + rows.stop - rows.start)
        query_R = torch.arange(rows.start, rows.stop, device=queries.device)
        positives_RE = batch.documents[batch.positive[rows]]
        scores_R = (batch.queries[rows].double() * positives_RE.double()).sum(dim=1)
        totals[0] += scores_R.sum()
        for is_positive_anchor, of_queries, groups in _kinds(batch, options, guide, query_R, scores_R):
            coefficient_RC: Tensor | None = None
            for group in groups:
                is_kept = group.logits_RC > -torch.inf
                num_kept = is_kept.sum()
                totals[3] += num_kept
                totals[4] += group.num_masked
                if group.is_query_document:
                    totals[1] += torch.where(is_kept, group.scores_RC, 0).double().sum()
                    totals[2] += num_kept
                sums = log_negatives[out, group.softmax]
                if not log_negatives_given:
                    log_negatives[out, group.softmax] = torch.logaddexp(sums, group.logits_RC.logsumexp(dim=1))
                    continue
                log_total_R = torch.logaddexp(sums, scores_R / tau)
                weights_RC = (options.scale / tau) * torch.exp(group.logits_RC - log_total_R[:, None])
                d_tau -= (weights_RC * group.scores_RC).sum() / tau
                coefficient_RC = weights_RC if coefficient_RC is None else coefficient_RC + weights_RC
            if coefficient_RC is None or not differs:
                continue
            coefficient_RC = coefficient_RC.to(dtype)
            anchors_RE = positives_RE if is_positive_anchor else batch.queries[rows]
            columns, d_columns = (batch.queries, d_queries) if of_queries else (batch.documents, d_documents)
            d_anchors_RE = coefficient_RC @ columns
            d_columns += coefficient_RC.T @ anchors_RE
            if is_positive_anchor:
                d_documents.index_add_(0, batch.positive[rows], d_anchors_RE)
            else:
                d_queries[rows] += d_anchors_RE
    return losses, totals, d_queries, d_documents, d_tau if learns else d_tau[:0]


def _kinds(
    batch: Batch, options: Options, guide: Guide, query_R: Tensor, scores_R: Tensor
) -> Iterator[tuple[bool, bool, list[_Group]]]:
    """For each kind of score: whether the positive is the anchor, whether queries are the columns, and its groups."""
    positive_R, num_documents = batch.positive[query_R], len(batch.documents)
    document = torch.arange(num_documents, device=query_R.device)
    text = document if batch.document_text is None else batch.document_text
    query_text = text[batch.positive] if batch.query_text is None else batch.query_text
    role = batch.role
    if role is None:
        role = torch.zeros_like(document, dtype=torch.uint8).index_fill_(0, batch.positive, 1)
    owner = torch.full_like(document, -1) if batch.owner is None else batch.owner
    equal_RM = text[None, :] == query_text[query_R][:, None]
    there_RM = document[None, :] != positive_R[:, None]
    own_RM = (owner[None, :] == query_R[:, None]) & there_RM
    is_positive = (role == 1)[None, :]
    members = {
        "own": own_RM,
        "positive": ~own_RM & there_RM & is_positive,
        "hard": ~own_RM & there_RM & ~is_positive,
    }
    others_RB = torch.arange(len(batch.queries), device=query_R.device)[None, :] != query_R[:, None]
    same_RB = query_text[None, :] == query_text[query_R][:, None]
    kinds = (
        (False, False, {"own_hard": "own", "batch_positive": "positive", "batch_hard": "hard"}),
        (False, True, {"query_query": ""}),
        (True, False, {"doc_own": "own", "doc_positive": "positive", "doc_hard": "hard"}),
    )
    on = {name: place for place, name in enumerate(options.groups)}
    guide_scores_R = (guide.queries[query_R].double() * guide.documents[positive_R].double()).sum(dim=1)
    guide_limit_R = guide_scores_R + guide.margin * (guide_scores_R.abs() if guide.relative else 1)
    for is_positive_anchor, of_queries, names in kinds:
        if not any(name in on for name in names):
            continue
        anchors, guide_anchors = (
            (x.documents[positive_R] if is_positive_anchor else x.queries[query_R]) for x in (batch, guide)
        )
        columns, guide_columns = ((x.queries if of_queries else x.documents) for x in (batch, guide))
        scores_RC = anchors @ columns.T
        over_RC = guide_anchors @ guide_columns.T > guide_limit_R[:, None]
        over_RC |= same_RB if of_queries else equal_RM
        by_query_RC: Tensor | None = None
        groups = []
        for name, member in names.items():
            if name not in on:
                continue
            place = on[name]
            candidate_RC = others_RB if of_queries else members[member]
            masked_RC = over_RC
            if options.masks[place] != "none":
                held_RC = scores_RC
                if options.masks[place] == "query_document" and is_positive_anchor:
                    by_query_RC = batch.queries[query_R] @ columns.T if by_query_RC is None else by_query_RC
                    held_RC = by_query_RC
                margin = options.margins[place] * (scores_R.abs() if options.relative[place] else 1)
                masked_RC = masked_RC | (held_RC > (scores_R + margin)[:, None])
            kept_RC = candidate_RC & ~masked_RC
            logits_RC = scores_RC.double() * (1 / options.temperature + options.hardness[place])
            softmax = 0
            if options.split:
                softmax = 0 if name == "own_hard" else 2 if of_queries else 3 if is_positive_anchor else 1
            groups.append(
                _Group(
                    logits_RC.masked_fill(~kept_RC, -torch.inf), scores_RC, softmax,
                    not (of_queries or is_positive_anchor), int((candidate_RC & masked_RC).sum()),
                )
            )  # fmt: skip
        yield is_positive_anchor, of_queries, groups
