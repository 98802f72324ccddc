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
from pyqemb.ops.groups import Options
from pyqemb.ops.info_nce import Anchors, Block, Columns, Others, info_nce_block
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
                    anchors=there(here),
                    positives=there(row_of[positive_text[anchors[here]]]),
                )
            )

    def loss(self, own_SE: Tensor, options: Options, tau: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """This rank's part of the loss, differentiable, and of the totals of the statistics."""
        return _RingLoss.apply(own_SE, tau, self, options)

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
        positives_RE = torch.empty_like(anchors_RE)
        for side, (block,) in ring.round(own_SE):
            positives_RE[side.anchors] = block[side.positives]

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
        d_own = travelling[1]
        for side, travelling in ring.round(d_own):
            travelling[0].index_add_(0, side.positives, first.d_positives_RE[side.anchors])
        d_own = travelling[0].index_add_(0, ring.anchors, first.d_anchors_RE)
        ctx.save_for_backward(d_own, first.d_temperature)
        ctx.dtype, ctx.tau = own_SE.dtype, None if tau is None else (tau.shape, tau.dtype)
        ctx.mark_non_differentiable(first.totals)
        return (first.losses_R.sum() * options.scale).to(d_own.dtype), first.totals

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_own, d_tau = ctx.saved_tensors
        to_tau = None
        if ctx.needs_input_grad[1]:
            shape, dtype = ctx.tau
            to_tau = (d_tau * grads[0]).to(dtype).reshape(shape)
        return (d_own * grads[0]).to(ctx.dtype), to_tau, None, None
