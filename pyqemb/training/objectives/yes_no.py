"""Yes or no: the loss of a reranker over the logits of the two answers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyqemb import ops
from pyqemb.data.batch import to_device
from pyqemb.data.example import Example
from pyqemb.data.loader import TrainingBatch, build_pairs
from pyqemb.data.shards import Summary
from pyqemb.model.protocols import TextEncoder
from pyqemb.model.reranker import Reranker
from pyqemb.training.objectives.base import LossPart, Objective


class YesNo(Objective):
    """The mean of -log p(label) over all pairs of a query and one of its documents.

    The statistic `positive` is the mean probability of yes for the positives.
    """

    name = "rerank"
    model = "rerank"
    columns = ("negatives",)
    statistics = ("positive",)

    @classmethod
    def missing_in(cls, examples: Sequence[Example]) -> str | None:
        found = any(example.negatives for example in examples)
        return None if found else "no example has negatives: every answer would be yes"

    @classmethod
    def may_miss(cls, summary: Summary) -> bool:
        return summary.negatives == 0

    @classmethod
    def build_batch(cls, examples: Sequence[Example], model: TextEncoder) -> TrainingBatch:
        assert isinstance(model, Reranker)
        return build_pairs(examples, model.default_instruction)

    def can_learn(self, batch_size: int, negatives: int, example: Example) -> bool:
        return negatives > 0

    def loss(self, batch: TrainingBatch, queries_B2: Tensor, logits_M2: Tensor, rows: slice) -> LossPart:
        device = logits_M2.device
        mine = (batch.owner >= rows.start) & (batch.owner < rows.stop)
        labels_M = torch.zeros(len(batch.owner), dtype=torch.int64)
        labels_M[batch.positive] = 1
        positive_R2 = logits_M2.detach()[to_device(batch.positive[rows], device)].double()
        totals = torch.sigmoid(positive_R2[:, 0] - positive_R2[:, 1]).sum().reshape(1)
        if not bool(mine.any()):
            return LossPart(0 * logits_M2.sum(), totals)
        own = to_device(mine, device)
        loss = ops.yes_no(logits_M2[own], to_device(labels_M, device)[own], reduction="sum") / len(labels_M)
        return LossPart(loss, totals)
