"""Distillation from a teacher's scores of the candidates, or from a teacher's vectors."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from pyqemb import ops
from pyqemb.data.batch import to_device
from pyqemb.data.example import Example
from pyqemb.data.loader import TrainingBatch
from pyqemb.data.shards import Summary
from pyqemb.training.objectives.base import EmbeddingSection, LossPart, Objective, number, positive_totals, zero_of


class DistillationSection(EmbeddingSection):
    """Settings of distillation."""

    teacher_temperature: float = Field(
        1.0, gt=0, description="Temperature of the softmax over a teacher's scores.", examples=[2.0]
    )


class Distillation(Objective):
    """Cross-entropy to the teacher's softmax over the candidates, or without scores cosine distance to its vectors."""

    name = "distillation"
    tasks = ("distillation",)
    columns = ("negatives", "scores", "query_embedding", "positive_embedding")
    positive_pairs = False
    statistics = ("positive",)
    Settings = DistillationSection

    @classmethod
    def missing(cls, example: Example) -> str | None:
        if example.scores or example.query_embedding:
            return None
        return "has neither scores nor query_embedding of a teacher"

    @classmethod
    def missing_in(cls, examples: Sequence[Example]) -> str | None:
        if len({bool(example.scores) for example in examples}) < 2:
            return None
        return "some examples have a teacher's scores and some not; they cannot share a batch"

    @classmethod
    def may_miss(cls, summary: Summary) -> bool:
        return summary.scores < summary.rows and (summary.scores > 0 or summary.query_embedding < summary.rows)

    def can_learn(self, batch_size: int, negatives: int, example: Example) -> bool:
        return negatives > 0 or not example.scores

    def loss(self, batch: TrainingBatch, queries_BE: Tensor, documents_ME: Tensor, rows: slice) -> LossPart:
        examples, share = batch.examples[rows], 1 / len(batch.examples)
        candidates_RK = to_device(batch.candidates[rows], queries_BE.device)

        def part(queries_BE: Tensor, documents_ME: Tensor) -> LossPart:
            totals = positive_totals(batch, queries_BE, documents_ME, rows)
            if not examples:
                return LossPart(zero_of(queries_BE, documents_ME), totals)
            compare = self._scores if examples[0].scores else _vectors
            return LossPart(share * compare(examples, queries_BE[rows], documents_ME, candidates_RK), totals)

        return self.over_prefixes(part, queries_BE, documents_ME)

    def _scores(
        self, examples: Sequence[Example], queries_RE: Tensor, documents_ME: Tensor, candidates_RK: Tensor
    ) -> Tensor:
        teacher_RK = torch.zeros(candidates_RK.shape, dtype=torch.float64)
        for row, example in enumerate(examples):
            teacher_RK[row, : len(example.scores)] = torch.tensor(example.scores, dtype=torch.float64)
        return ops.distill_scores(
            queries_RE, documents_ME, candidates_RK, to_device(teacher_RK, queries_RE.device), number(self.temperature),
            self.settings.teacher_temperature, reduction="sum",
        )  # fmt: skip


def _vectors(examples: Sequence[Example], queries_RE: Tensor, documents_ME: Tensor, candidates_RK: Tensor) -> Tensor:
    sides = [(queries_RE, [example.query_embedding for example in examples])]
    if examples[0].positive_embedding:
        sides.append((documents_ME[candidates_RK[:, 0]], [example.positive_embedding for example in examples]))
    losses = [
        ops.distill_embeddings(student, to_device(torch.tensor(vectors), student.device), reduction="sum")
        for student, vectors in sides
    ]
    return torch.stack(losses).mean()
