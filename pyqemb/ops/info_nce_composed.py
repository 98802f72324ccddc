"""InfoNCE by several sweeps: what follows from the log sums of the rows alone is computed here, in torch.

Two sweeps for each kind of anchor. The first returns the log sum of the candidates of each row. From these sums,
`row_losses` computes the losses and the weight of each log sum in the loss. The second sweep takes the weights and
returns the gradients. No score matrix exists. Legend: R rows, S softmaxes, B queries, M documents, E dimension.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyqemb import _C
from pyqemb.ops.common import arithmetic
from pyqemb.ops.groups import DOC_QUERY, Options
from pyqemb.ops.info_nce_guided import Guide, guided_sweep
from pyqemb.ops.info_nce_sweep import Batch, sweep

Sweep = Callable[..., tuple[Tensor, ...]]
_COUNTING = 1e12  # a temperature at which every candidate has weight 1: the log sum is then the log of their number
_NOTHING = -1e30  # the log of an empty sum, finite so that its gradient is 0 and not NaN
_UNWEIGHTED = 600.0  # a sum that is larger by this factor (in nats) leaves no weight to a candidate
_ROWS = 1024  # rows of a product in float64


class RowSums(NamedTuple):
    """The log sums of rows over their candidates, and the logs of the numbers of candidates; -inf where none is."""

    main_RS: Tensor  # float64, a column for each softmax of the kernels
    doc_query_R: Tensor | None = None
    main_counts_RS: Tensor | None = None  # if tau_plus > 0
    doc_query_counts_R: Tensor | None = None


class RowLosses(NamedTuple):
    """The losses of rows, and the derivatives of `options.scale` times their sum."""

    losses_R: Tensor
    main_RS: Tensor  # by the log sums
    doc_query_R: Tensor | None
    scores_R: Tensor  # by the scores of the positives
    temperature: Tensor

    def weights(self) -> list[Tensor]:
        """The derivatives by the log sums [R, S] of each kind of sweep."""
        if self.doc_query_R is None:
            return [self.main_RS]
        return [self.main_RS, F.pad(self.doc_query_R[:, None], (0, self.main_RS.shape[1] - 1))]


def row_losses(sums: RowSums, scores_R: Tensor, options: Options, weights_R: Tensor | None = None) -> RowLosses:
    """The loss of each row and its derivatives, given the log sums and the scores of the positives; float64.

    In closed form, because autograd does not record inside of a torch op. `weights_R` multiply the rows (default: 1).
    """
    tau, (num_rows, softmaxes) = options.temperature, sums.main_RS.shape
    logits_R1 = scores_R[:, None] / tau
    log_sums_RS, log_counts_RS = (
        None if x is None else x.clamp_min(_NOTHING) for x in (sums.main_RS, sums.main_counts_RS)
    )
    assert log_sums_RS is not None
    to_doc_query: Tensor | None = None  # the share of doc_query in a joint sum
    if sums.doc_query_R is not None:
        added, added_counts = (
            None if x is None else x.clamp_min(_NOTHING)[:, None] for x in (sums.doc_query_R, sums.doc_query_counts_R)
        )
        assert added is not None
        if options.split:
            log_sums_RS = torch.cat([log_sums_RS, added], dim=1)
        else:
            to_doc_query = torch.sigmoid(added - log_sums_RS[:, :1])
            log_sums_RS = torch.logaddexp(log_sums_RS[:, :1], added)
        if log_counts_RS is not None and added_counts is not None:
            log_counts_RS = (
                torch.cat([log_counts_RS, added_counts], dim=1)
                if options.split
                else torch.logaddexp(log_counts_RS[:, :1], added_counts)
            )
    elif not options.split:
        log_sums_RS = log_sums_RS[:, :1]
    debias = None
    if log_counts_RS is not None:
        log_counts_RS = log_counts_RS[:, : log_sums_RS.shape[1]]
        debias = debiased(log_sums_RS, log_counts_RS, logits_R1, tau, options.tau_plus)
        log_sums_RS = debias.log_sums

    gap_RS = log_sums_RS - logits_R1
    left_RS = torch.sigmoid(gap_RS)  # 1 - P of the positive
    losses_RS = torch.logaddexp(gap_RS, torch.zeros_like(gap_RS))  # -log P
    d_sums_RS = left_RS
    if options.focal:
        factor_RS = left_RS**options.focal
        d_sums_RS = factor_RS * (options.focal * torch.sigmoid(-gap_RS) * losses_RS + left_RS)
        losses_RS = factor_RS * losses_RS
    if weights_R is not None:
        losses_RS, d_sums_RS = losses_RS * weights_R[:, None], d_sums_RS * weights_R[:, None]
    d_sums_RS = options.scale * d_sums_RS
    d_logits_RS, d_tau = -d_sums_RS, torch.zeros_like(scores_R)
    if debias is not None:
        d_logits_RS = d_logits_RS + d_sums_RS * debias.by_logit
        d_tau = (d_sums_RS * debias.by_temperature).sum(dim=1)
        d_sums_RS = d_sums_RS * debias.by_log_sum
    d_logits_R = d_logits_RS.sum(dim=1)
    d_tau = d_tau - d_logits_R * scores_R / tau**2

    d_main_RS = torch.zeros(num_rows, softmaxes, dtype=torch.float64, device=scores_R.device)
    d_doc_query_R = None
    if to_doc_query is not None:
        d_doc_query_R = (d_sums_RS * to_doc_query)[:, 0]
        d_sums_RS = d_sums_RS * (1 - to_doc_query)
    elif sums.doc_query_R is not None:
        d_doc_query_R, d_sums_RS = d_sums_RS[:, -1], d_sums_RS[:, :-1]
    d_main_RS[:, : d_sums_RS.shape[1]] = d_sums_RS
    return RowLosses(losses_RS.sum(dim=1), d_main_RS, d_doc_query_R, d_logits_R / tau, d_tau.sum())


class Debiased(NamedTuple):
    """Debiased log sums, and their derivatives."""

    log_sums: Tensor
    by_log_sum: Tensor
    by_logit: Tensor
    by_temperature: Tensor


def debiased(log_sums: Tensor, log_counts: Tensor, logits: Tensor, temperature: float, tau_plus: float) -> Debiased:
    """The logarithm of the debiased sum over the candidates.

    max((S - tau_plus * N * exp(logit)) / (1 - tau_plus), N * exp(-1 / temperature)), S the sum over N candidates.

    Args:
        log_sums: log S, of any shape.
        log_counts: log N.
        logits: the positive's logit.
        temperature: tau.
        tau_plus: the probability that a candidate is a positive.

    Source: Chuang et al. 2020 (arXiv 2007.00224), equation 8, with M = 1.
    """
    log_ratio = log_sums - (log_counts + math.log(tau_plus) + logits)  # S over what is subtracted from it
    left = -torch.expm1(-log_ratio.clamp_min(0))  # the share of S that stays
    estimate = log_sums + torch.log(left) - math.log1p(-tau_plus)
    floor = log_counts - 1 / temperature
    is_estimate = ~(estimate <= floor)  # NaN stays
    zero = torch.zeros_like(estimate)
    return Debiased(
        torch.where(is_estimate, estimate, floor),
        torch.where(is_estimate, 1 / left, zero),
        torch.where(is_estimate, 1 - 1 / left, zero),
        torch.where(is_estimate, zero, 1 / temperature**2),
    )


def gradient_options(options: Options, tau_plus: float) -> Options:
    """The options of the second of two sweeps, given those of the first.

    Its scale is at least twice every weight of a log sum times max(1, P / S), so that `given_sums` exist.
    """
    scale = 2 * options.scale * (1 + options.focal) / (1 - tau_plus)
    return options._replace(scale=scale, focal=0.0)


def given_sums(weights: Tensor, log_sums: Tensor, logits: Tensor, scale: float) -> Tensor:
    """The log sums that make the kernels weigh each candidate by weight / S.

    Given a log sum log(G), they weigh it by scale / (G + P), P the positive's. So G = scale * S / weight - P.
    """
    wanted = math.log(scale) + log_sums - torch.log(weights)
    given = wanted + torch.log(-torch.expm1(logits - wanted))
    none = (weights <= 0) | (log_sums == -torch.inf)
    return torch.where(none, torch.maximum(log_sums, logits) + _UNWEIGHTED, given)


def main_options(options: Options) -> Options:
    """The options of the sweeps of queries and documents."""
    return options._replace(tau_plus=0.0)


def doc_query_options(options: Options) -> Options:
    """The options of the sweeps in which the positives are the anchors, and the queries the documents."""
    at = list(options.groups).index(DOC_QUERY)
    return options._replace(
        groups=["batch_positive"],
        masks=[options.masks[at]],
        margins=[options.margins[at]],
        relative=[options.relative[at]],
        hardness=[options.hardness[at]],
        split=False,
        tau_plus=0.0,
    )


def counting_options(options: Options) -> Options:
    """The options of a sweep that counts candidates."""
    return options._replace(temperature=_COUNTING, hardness=[0.0] * len(options.groups))


def row_products(left_RE: Tensor, right_RE: Tensor) -> Tensor:
    """The dot product of each pair of rows, in float64 [R]."""
    parts = [
        (left.double() * right.double()).sum(dim=1)
        for left, right in zip(left_RE.split(_ROWS), right_RE.split(_ROWS), strict=True)
    ]
    return torch.cat(parts)


def composed(
    batch: Batch,
    options: Options,
    *,
    first_row: int,
    num_rows: int,
    differs: bool,
    learns: bool,
    weights_R: Tensor | None = None,
    guide: Guide | None = None,
) -> tuple[Tensor, ...]:
    """The loss, the totals, and the gradients of queries, documents and temperature.

    The arguments and the results are those of `sweep`, but the loss is one scaled number in float64. `weights_R` are
    weights of the rows, at most 1 (default: 1). With a `guide`, the sweeps are those of `guided_sweep`.
    """
    queries, documents, device = batch.queries, batch.documents, batch.queries.device
    rows = slice(first_row, first_row + num_rows)
    positive = batch.positive.clamp(0, len(documents) - 1)  # (an index that is wrong is found by the first sweep)
    scores_R = row_products(queries[rows], documents[positive[rows]])

    def sums(batch: Batch, options: Options, sweep: Sweep) -> tuple[Tensor, Tensor, Tensor]:
        log_sums_RS = torch.full((num_rows, _C.MAX_SOFTMAXES), -torch.inf, dtype=torch.float64, device=device)
        losses_R, totals, *_ = sweep(
            batch, options, first_row=first_row, num_rows=num_rows, differs=False, learns=False,
            log_negatives=log_sums_RS,
        )  # fmt: skip
        return log_sums_RS, totals, losses_R

    kinds = [(batch, main_options(options), _sweep_with(guide))]
    if DOC_QUERY in options.groups:
        turned = guide and guide._replace(queries=guide.documents[positive], documents=guide.queries)
        kinds.append((_turned(batch, positive), doc_query_options(options), _sweep_with(turned)))
    log_sums, totals, losses = zip(*(sums(*kind) for kind in kinds), strict=True)
    counts: list[Tensor] = []
    if options.tau_plus:
        counts = [sums(each, counting_options(of), run)[0] for each, of, run in kinds]
    row_sums = RowSums(
        log_sums[0],
        log_sums[1][:, 0] if len(kinds) > 1 else None,
        counts[0] if counts else None,
        counts[1][:, 0] if len(counts) > 1 else None,
    )
    scores_R = torch.where(losses[0].isnan(), losses[0], scores_R)
    result = row_losses(row_sums, scores_R, options, weights_R)
    total = totals[0].clone()
    if weights_R is not None:
        total[0] = (weights_R * scores_R).sum()
    for more in totals[1:]:
        total[3:] += more[3:]  # candidates kept and masked

    dtype = arithmetic(queries.dtype)
    d_queries, d_documents = (
        torch.zeros_like(x, dtype=dtype) if differs else x.new_empty(0, dtype=dtype) for x in (queries, documents)
    )
    d_tau = result.temperature.reshape(1) if learns else queries.new_empty(0, dtype=torch.float64)
    logits_R1 = (scores_R / options.temperature)[:, None]
    for number, (each, first, run) in enumerate(kinds if differs or learns else []):
        of = gradient_options(first, options.tau_plus)
        given_RS = given_sums(result.weights()[number], log_sums[number], logits_R1, of.scale)
        _, _, d_anchors, d_columns, more_tau = run(
            each, of, first_row=first_row, num_rows=num_rows, differs=differs, learns=learns,
            log_negatives=given_RS.contiguous(), log_negatives_given=True, adds_positive=False,
        )  # fmt: skip
        if learns:
            d_tau = d_tau + more_tau
        if differs and number == 0:
            d_queries += d_anchors
            d_documents += d_columns
        elif differs:
            d_documents.index_add_(0, positive, d_anchors)
            d_queries += d_columns
    if differs:
        d_scores_R1 = result.scores_R[:, None].to(dtype)
        d_documents.index_add_(0, positive[rows], d_scores_R1 * queries[rows])
        d_queries[rows] += d_scores_R1 * documents[positive[rows]]
    return options.scale * result.losses_R.sum(), total, d_queries, d_documents, d_tau


def over_positives(
    batch: Batch,
    options: Options,
    *,
    more_X2: Tensor,
    first_row: int,
    num_rows: int,
    differs: bool,
    learns: bool,
    guide: Guide | None = None,
) -> tuple[Tensor, ...]:
    """`composed` for queries with several positives: the mean over the positives of each query.

    One call for each place in the lists of positives. In a call, each query has one positive, and its other positives
    count as equal texts, so they are masked. `batch.positive` is the first positive of each query; `more_X2` are pairs
    of a query and a further positive.
    """
    device, num_queries = batch.positive.device, len(batch.positive)
    pairs = sorted(map(tuple, more_X2.tolist()))
    positive = batch.positive.cpu()
    texts = torch.arange(len(batch.documents)) if batch.document_text is None else batch.document_text.cpu()
    texts = _merged(texts, torch.tensor([[int(positive[query]), document] for query, document in pairs]).reshape(-1, 2))
    role = torch.zeros(len(texts), dtype=torch.uint8)
    role[positive] = 1
    places: list[list[tuple[int, int]]] = []  # of the second positives, of the third, ...
    number = [0] * num_queries
    for query, document in pairs:
        role[document] = 1
        number[query] += 1
        if first_row <= query < first_row + num_rows:
            while len(places) < number[query]:
                places.append([])
            places[number[query] - 1].append((query, document))
    weights = 1 / (1 + torch.tensor(number, dtype=torch.float64))
    batch = batch._replace(document_text=texts.to(device), query_text=texts[positive].to(device), role=role.to(device))
    loss, totals, d_queries, d_documents, d_tau = composed(
        batch, options, first_row=first_row, num_rows=num_rows, differs=differs, learns=learns,
        weights_R=weights[first_row : first_row + num_rows].to(device), guide=guide,
    )  # fmt: skip
    for place in places:
        # The queries with a positive in this place come first, the others are only candidates.
        rows = torch.tensor([query for query, _ in place])
        is_row = torch.zeros(num_queries, dtype=torch.bool)
        is_row[rows] = True
        order = torch.cat([rows, torch.nonzero(~is_row)[:, 0]])
        at = torch.empty(num_queries, dtype=torch.int64)
        at[order] = torch.arange(num_queries)
        positives = torch.cat([torch.tensor([document for _, document in place]), positive[order[len(rows) :]]])
        order, at, positives, weights_R = (x.to(device) for x in (order, at, positives, weights[rows]))
        owner = None if batch.owner is None else torch.where(batch.owner >= 0, at[batch.owner.clamp_min(0)], -1)
        assert batch.query_text is not None
        part = composed(
            batch._replace(
                queries=batch.queries[order], positive=positives, query_text=batch.query_text[order], owner=owner
            ),
            options, first_row=0, num_rows=len(rows), differs=differs, learns=learns, weights_R=weights_R,
            guide=guide and guide._replace(queries=guide.queries[order]),
        )  # fmt: skip
        loss, totals = loss + part[0], totals + part[1]
        if differs:
            d_queries[order] += part[2]
            d_documents += part[3]
        d_tau = d_tau + part[4]
    return loss, totals, d_queries, d_documents, d_tau


def _sweep_with(guide: Guide | None) -> Sweep:
    return sweep if guide is None else partial(guided_sweep, guide=guide)


def _merged(texts: Tensor, pairs_X2: Tensor) -> Tensor:
    """Text ids in which the texts of each pair of documents are equal, and so are texts that a chain of pairs joins."""
    parent: dict[int, int] = {}

    def root(text: int) -> int:
        while text in parent:
            text = parent[text]
        return text

    for first, second in texts[pairs_X2].tolist():
        one, other = root(first), root(second)
        if one != other:
            parent[max(one, other)] = min(one, other)
    return torch.tensor([root(text) for text in texts.tolist()])


def _turned(batch: Batch, positive: Tensor) -> Batch:
    """The batch whose anchors are the positives, and whose documents are the queries."""
    texts = positive if batch.document_text is None else batch.document_text[positive]
    return Batch(
        queries=batch.documents[positive],
        documents=batch.queries,
        positive=torch.arange(len(positive), device=positive.device),
        query_text=None,
        document_text=texts,
        role=None,
        owner=None,
    )
