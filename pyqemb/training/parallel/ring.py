"""InfoNCE without gathering: blocks of vectors are passed around a ring of ranks and compared with each rank's anchors.

No rank holds more than its own vectors and one other block. The anchors of a rank are the queries that it has encoded.
There are four rounds: the positives of the anchors are collected; each row's sum over its candidates is accumulated;
with the final sums, gradients are computed and returned with their block; the gradients of the positives are returned.
Legend: R anchors of this rank, n vectors of a block, E dimension.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyqemb.data.batch import to_device
from pyqemb.data.loader import TrainingBatch
from pyqemb.ops.groups import DOC_QUERY, Options
from pyqemb.ops.info_nce import Anchors, Block, Columns, Others, info_nce_block
from pyqemb.ops.info_nce_composed import (
    RowSums,
    counting_options,
    doc_query_options,
    given_sums,
    gradient_options,
    main_options,
    row_losses,
    row_products,
)
from pyqemb.training.parallel.world import World


@dataclass(frozen=True)
class _Side:
    """The documents and queries of the batch that the vectors of a block represent.

    Indices are on the device of the vectors.
    """

    columns: Tensor  # row of the block of each document
    column_text: Tensor
    column_role: Tensor
    column_owner: Tensor  # the index among this rank's anchors, or -1
    others: Tensor  # row of the block of each query
    other_text: Tensor  # of its positive
    other_owner: Tensor  # the index among this rank's anchors, or -1
    anchors: Tensor  # the anchors of this rank whose positive is in the block
    positives: Tensor  # the row of that positive in the block


class Ring:
    """A batch, divided into the blocks of a ring."""

    def __init__(self, world: World, batch: TrainingBatch, partition: Sequence[np.ndarray], device: torch.device):
        self.world, self.sizes = world, [len(texts) for texts in partition]
        query_text, document_text = batch.query_text.numpy(), batch.document_text.numpy()
        positive, owner = batch.positive.numpy(), batch.owner.numpy()
        positive_text = document_text[positive]
        role = np.zeros(len(document_text), dtype=np.uint8)
        role[positive] = 1
        row_of = np.full(len(batch.texts), -1)

        def there(values: np.ndarray) -> Tensor:
            return to_device(torch.from_numpy(values), device)

        def rows_in(texts: np.ndarray) -> np.ndarray:
            row_of[:] = -1
            row_of[texts] = np.arange(len(texts))
            return row_of

        anchors = np.flatnonzero(rows_in(partition[world.rank])[query_text] >= 0)
        anchor_of = np.full(len(query_text), -1)
        anchor_of[anchors] = np.arange(len(anchors))
        self.anchors = there(row_of[query_text[anchors]])  # rows of this rank's block
        self.anchor_text = there(positive_text[anchors])
        self.num_queries = len(query_text)
        self._num_owned = int((owner[positive[anchors]] == anchors).sum())  # anchors that own their positive
        self.sides = []
        for texts in partition:
            rows_in(texts)
            columns, others = (np.flatnonzero(row_of[each] >= 0) for each in (document_text, query_text))
            here = np.flatnonzero(row_of[positive_text[anchors]] >= 0)
            self.sides.append(
                _Side(
                    columns=there(row_of[document_text[columns]]),
                    column_text=there(document_text[columns]),
                    column_role=there(role[columns]),
                    column_owner=there(np.where(owner[columns] >= 0, anchor_of[owner[columns]], -1)),
                    others=there(row_of[query_text[others]]),
                    other_text=there(positive_text[others]),
                    other_owner=there(anchor_of[others]),
                    anchors=there(here),
                    positives=there(row_of[positive_text[anchors[here]]]),
                )
            )

    def loss(self, own_SE: Tensor, options: Options, tau: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """This rank's part of the loss, differentiable, and of the totals of the statistics."""
        return _RingLoss.apply(own_SE, tau, self, options)

    def num_own(self, options: Options) -> int:
        """How often a block contains the positive of an anchor as a document, or the anchor as a query.

        They are masked, because the texts are equal. They are no candidates, so the statistics do not count them.
        """
        rows = len(self.anchors)
        counts = {
            "own_hard": self._num_owned, "doc_own": self._num_owned, "batch_positive": rows - self._num_owned,
            "doc_positive": rows - self._num_owned, "query_query": rows,
        }  # fmt: skip
        return sum(count for group, count in counts.items() if group in options.groups)

    def round(self, *own: Tensor) -> Iterator[tuple[_Side, list[Tensor]]]:
        """Yield each block once, this rank's own first: its indices, and the tensors that are sent with it.

        The caller may change these tensors in place. After the iteration the last list holds the tensors of this rank's
        own block again.
        """
        rank, size = self.world.rank, self.world.size
        travelling = list(own)
        for hop in range(size):
            yield self.sides[(rank - hop) % size], travelling
            rows = self.sizes[(rank - hop - 1) % size]
            travelling[:] = [self.world.ring_shift(tensor, rows) for tensor in travelling]


class _RingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_SE: Tensor, tau: Tensor | None, ring: Ring, options: Options) -> tuple[Tensor, Tensor]:
        own_SE = own_SE.contiguous()
        anchors_RE = own_SE[ring.anchors]
        num_own = ring.num_own(options)
        positives_RE = torch.empty_like(anchors_RE)
        for side, (block,) in ring.round(own_SE):
            positives_RE[side.anchors] = block[side.positives]

        if options.is_composed:
            loss, totals, d_own, d_temperature = _several_sweeps(ring, own_SE, anchors_RE, positives_RE, options)
            totals[4] -= num_own
            return _keep(ctx, own_SE, tau, loss, totals, d_own, d_temperature)
        anchors = Anchors(anchors_RE, positives_RE, ring.anchor_text)

        def meet(side: _Side, block: Tensor, **given: Any) -> Block:
            columns = Columns(block[side.columns], side.column_text, side.column_role, side.column_owner)
            others = Others(block[side.others], side.other_text)
            return info_nce_block(anchors, columns, others, options, **given)

        log_negatives: Tensor | None = None
        for side, (block,) in ring.round(own_SE):
            sums = meet(side, block).log_negatives_RS
            log_negatives = sums if log_negatives is None else torch.logaddexp(log_negatives, sums)

        d_own = torch.zeros_like(own_SE, dtype=torch.promote_types(own_SE.dtype, torch.float32))
        first: Block | None = None
        travelling: list[Tensor] = []
        for side, travelling in ring.round(own_SE, d_own):
            block, d_block = travelling
            part = meet(side, block, log_negatives_RS=log_negatives, adds_positive=first is None, gradients=True)
            d_block.index_add_(0, side.columns, part.d_columns_CE)
            d_block.index_add_(0, side.others, part.d_others_QE)
            if first is None:
                first = part
                continue
            for total, more in (
                (first.d_anchors_RE, part.d_anchors_RE), (first.d_positives_RE, part.d_positives_RE),
                (first.d_temperature, part.d_temperature), (first.totals[1:], part.totals[1:]),
            ):  # fmt: skip
                total += more
        assert first is not None
        d_own = _return_gradients(ring, travelling[1], first.d_anchors_RE, first.d_positives_RE)
        loss = first.losses_R.sum() * options.scale
        first.totals[4] -= num_own
        return _keep(ctx, own_SE, tau, loss, first.totals, d_own, first.d_temperature)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_own, d_tau = ctx.saved_tensors
        to_tau = None
        if ctx.needs_input_grad[1]:
            shape, dtype = ctx.tau
            to_tau = (d_tau * grads[0]).to(dtype).reshape(shape)
        return (d_own * grads[0]).to(ctx.dtype), to_tau, None, None


def _keep(
    ctx: Any, own_SE: Tensor, tau: Tensor | None, loss: Tensor, totals: Tensor, d_own_SE: Tensor, d_temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Save the gradients, and return the loss and the totals."""
    ctx.save_for_backward(d_own_SE, d_temperature)
    ctx.dtype, ctx.tau = own_SE.dtype, None if tau is None else (tau.shape, tau.dtype)
    ctx.mark_non_differentiable(totals)
    return loss.to(d_own_SE.dtype), totals


def _return_gradients(ring: Ring, d_own_SE: Tensor, d_anchors_RE: Tensor, d_positives_RE: Tensor) -> Tensor:
    """Add the gradients of the anchors, and send those of their positives to the ranks that have encoded them."""
    travelling: list[Tensor] = []
    for side, travelling in ring.round(d_own_SE):
        travelling[0].index_add_(0, side.positives, d_positives_RE[side.anchors])
    return travelling[0].index_add_(0, ring.anchors, d_anchors_RE)


def _several_sweeps(
    ring: Ring, own_SE: Tensor, anchors_RE: Tensor, positives_RE: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, the totals, and the gradients of the vectors and the temperature, as in ops/info_nce_composed.py."""

    def queries_as_candidates(side: _Side, block: Tensor, of: Options, **given: Any) -> Block:
        role = torch.ones_like(side.other_owner, dtype=torch.uint8)
        columns = Columns(block[side.others], side.other_text, role, side.other_owner)
        none = Others(block[:0], side.other_text[:0])
        return info_nce_block(Anchors(positives_RE, anchors_RE, ring.anchor_text), columns, none, of, **given)

    def documents_as_candidates(side: _Side, block: Tensor, of: Options, **given: Any) -> Block:
        columns = Columns(block[side.columns], side.column_text, side.column_role, side.column_owner)
        others = Others(block[side.others], side.other_text)
        return info_nce_block(Anchors(anchors_RE, positives_RE, ring.anchor_text), columns, others, of, **given)

    kinds = [(documents_as_candidates, main_options(options))]
    if DOC_QUERY in options.groups:
        kinds.append((queries_as_candidates, doc_query_options(options)))
    log_sums: list[Tensor | None] = [None, None]
    log_counts: list[Tensor | None] = [None, None]
    totals = torch.zeros(5, dtype=torch.float64, device=own_SE.device)
    for side, (block,) in ring.round(own_SE):
        for number, (meet, of) in enumerate(kinds):
            part = meet(side, block, of)
            log_sums[number] = _added(log_sums[number], part.log_negatives_RS)
            totals += part.totals * torch.tensor([0, number == 0, number == 0, 1, 1], device=own_SE.device)
            if options.tau_plus:
                log_counts[number] = _added(
                    log_counts[number], meet(side, block, counting_options(of)).log_negatives_RS
                )

    scores_R = row_products(anchors_RE, positives_RE)
    totals[0] = scores_R.sum()
    main_RS, (doc_query_RS, counts_RS, doc_query_counts_RS) = log_sums[0], (log_sums[1], *log_counts)
    assert main_RS is not None
    sums = RowSums(main_RS, _first(doc_query_RS), counts_RS, _first(doc_query_counts_RS))
    result = row_losses(sums, scores_R, options)
    logits_R1 = (scores_R / options.temperature)[:, None]
    second = [gradient_options(of, options.tau_plus) for _, of in kinds]
    given = [
        given_sums(weight_RS, sums_RS, logits_R1, of.scale).contiguous()
        for weight_RS, sums_RS, of in zip(result.weights(), log_sums, second, strict=False)
        if sums_RS is not None
    ]

    dtype = torch.promote_types(own_SE.dtype, torch.float32)
    d_anchors_RE, d_positives_RE = (torch.zeros_like(x, dtype=dtype) for x in (anchors_RE, positives_RE))
    d_temperature = result.temperature.reshape(1)
    d_scores_R1 = result.scores_R[:, None].to(dtype)
    d_anchors_RE += d_scores_R1 * positives_RE
    d_positives_RE += d_scores_R1 * anchors_RE
    travelling: list[Tensor] = []
    for side, travelling in ring.round(own_SE, torch.zeros_like(own_SE, dtype=dtype)):
        block, d_block = travelling
        for number, (meet, _) in enumerate(kinds):
            part = meet(
                side, block, second[number], log_negatives_RS=given[number], adds_positive=False, gradients=True
            )
            d_temperature = d_temperature + part.d_temperature
            first, last = (d_anchors_RE, d_positives_RE) if number == 0 else (d_positives_RE, d_anchors_RE)
            first += part.d_anchors_RE
            last += part.d_positives_RE
            d_block.index_add_(0, side.columns if number == 0 else side.others, part.d_columns_CE)
            if number == 0:
                d_block.index_add_(0, side.others, part.d_others_QE)
    d_own_SE = _return_gradients(ring, travelling[1], d_anchors_RE, d_positives_RE)
    return options.scale * result.losses_R.sum(), totals, d_own_SE, d_temperature


def _added(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else torch.logaddexp(total, more)


def _first(sums_RS: Tensor | None) -> Tensor | None:
    return None if sums_RS is None else sums_RS[:, 0]
