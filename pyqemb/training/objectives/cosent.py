"""CoSENT: the loss for pairs with graded scores, which compares the order of the cosines and the scores."""

import torch
from torch import Tensor

from pyqemb import ops
from pyqemb.data.batch import to_device
from pyqemb.data.example import Example
from pyqemb.data.loader import TrainingBatch
from pyqemb.data.shards import Summary
from pyqemb.training.objectives.base import EmbeddingSection, LossPart, Objective, number, positive_totals, zero_of


class CoSENT(Objective):
    """One loss of all pairs of the batch, computed on rank 0."""

    name = "cosent"
    tasks = ("sts",)
    columns = ("score",)
    positive_pairs = False
    statistics = ("positive",)
    Settings = EmbeddingSection

    @classmethod
    def missing(cls, example: Example) -> str | None:
        return "has no score, which CoSENT compares" if example.score is None else None

    @classmethod
    def may_miss(cls, summary: Summary) -> bool:
        return summary.score < summary.rows

    def can_learn(self, batch_size: int, negatives: int, example: Example) -> bool:
        return batch_size > 1

    def loss(self, batch: TrainingBatch, queries_BE: Tensor, documents_ME: Tensor, rows: slice) -> LossPart:
        device, first = queries_BE.device, rows.start == 0 and rows.stop > 0
        scores_B = to_device(torch.tensor([example.score for example in batch.examples], dtype=torch.float64), device)
        positive_B = to_device(batch.positive, device)

        def part(queries_BE: Tensor, documents_ME: Tensor) -> LossPart:
            totals = positive_totals(batch, queries_BE, documents_ME, rows)
            if not first:
                return LossPart(zero_of(queries_BE, documents_ME), totals)
            loss = ops.cosent(queries_BE, documents_ME[positive_B], scores_B, number(self.temperature))
            return LossPart(loss, totals)

        return self.over_prefixes(part, queries_BE, documents_ME)
