"""The batch of a step, and the values that all ranks agree on.

Legend: S texts of a batch, E dimension.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyqemb.data.batch import PackedBatch, to_device
from pyqemb.data.loader import GuideVectors, TrainingBatch
from pyqemb.errors import PyqembError
from pyqemb.model.protocols import TextEncoder
from pyqemb.training.config import TrainConfig
from pyqemb.training.datasets import Datasets, make_loader, num_steps, token_cache
from pyqemb.training.objectives import LossParameters, LossPart, Objective
from pyqemb.training.objectives.base import zero_of
from pyqemb.training.objectives.fake_quantize import fake_quantize
from pyqemb.training.objectives.spread_out import spread_out
from pyqemb.training.parallel.ring import Ring
from pyqemb.training.parallel.world import World
from pyqemb.training.teacher import Guide, Teacher


@dataclass(frozen=True)
class StepBatch:
    """The batch of a step: its texts, their objective, and the tokens of this rank's texts."""

    dataset: str
    number: int  # batches of the dataset before this one
    objective: Objective
    texts: TrainingBatch
    partition: list[np.ndarray]  # the texts of each rank
    stream: PackedBatch  # the tokens of this rank
    teacher: Teacher | None = None  # None also if the weight of its loss is 0
    weights: tuple[float, float] = (1.0, 0.0)  # of the objective's loss, of the teacher's
    guide: Guide | None = None

    @property
    def num_queries(self) -> int:
        """The number of queries of all ranks."""
        return len(self.texts.positive)

    def loss(self, own_SE: Tensor, world: World, ring: bool) -> LossPart:
        """This rank's part of the loss, given the vectors of its own texts.

        It is the mean over `loss.precisions`, plus the regularizer and the teacher's loss. The statistics are those of
        the first precision, and the teacher's loss.
        """
        section = self.objective.section
        texts = self._guided_texts(world, own_SE.device)
        parts = [
            self._objective_loss(texts, fake_quantize(own_SE, precision), world, ring)
            for precision in section.precisions
        ]
        loss = torch.stack([part.loss for part in parts]).mean() if len(parts) > 1 else parts[0].loss
        objective_weight, teacher_weight = self.weights
        if objective_weight != 1:
            loss = objective_weight * loss
        if section.spread_out:
            for side in (self.texts.query_text, self.texts.document_text):
                counts = torch.bincount(side, minlength=len(self.texts.texts))
                own = counts[torch.from_numpy(np.asarray(self.partition[world.rank], dtype=np.int64))]
                loss = loss + section.spread_out * spread_out(own_SE, own, len(side), world)
        totals, projection = parts[0].totals, self.objective.parameters.projection
        if self.teacher is None and projection is not None:
            loss = loss + 0 * projection.sum()  # its gradient is 0, not missing: the optimizer steps it as always
        if self.teacher is not None:
            own_texts = self.partition[world.rank].tolist()
            part = self.teacher.loss(self.texts, own_texts, own_SE, projection)
            loss = loss + teacher_weight * part
            totals = torch.cat([totals, part.detach().double().reshape(1).to(totals.device)])
        return LossPart(loss, totals)

    def stats(self, totals: Tensor) -> dict[str, float]:
        """The statistics of the step, given the totals of all ranks."""
        if self.teacher is None:
            return self.objective.stats(totals, self.num_queries)
        return {**self.objective.stats(totals[:-1], self.num_queries), "teacher": float(totals[-1])}

    def _guided_texts(self, world: World, device: torch.device) -> TrainingBatch:
        """The texts with the guide's vectors, of which each rank encodes its part, if the objective uses them."""
        if self.guide is None or not self.objective.guided:
            return self.texts
        own_SF = torch.from_numpy(self.guide.vectors(self.texts, self.partition[world.rank].tolist())).to(device)
        with torch.no_grad():
            vectors_SF = world.all_gather(own_SF, self.partition)
        section = self.guide.section
        return replace(self.texts, guide=GuideVectors(vectors_SF, section.margin, section.relative))

    def _objective_loss(self, batch: TrainingBatch, own_SE: Tensor, world: World, ring: bool) -> LossPart:
        """The objective's part of the loss.

        The vectors of all ranks are gathered, or, with `ring` and an objective that supports it, blocks go around the
        ranks.
        """
        device = own_SE.device
        if ring and self.objective.can_ring:
            part = self.objective.ring_loss(Ring(world, batch, self.partition, device), own_SE)
            return checked_part(part, self.objective)
        vectors_SE = world.all_gather(own_SE, self.partition)
        queries_BE, documents_ME = (
            vectors_SE.index_select(0, to_device(texts, device)) for texts in (batch.query_text, batch.document_text)
        )
        rows = world.local_range(self.num_queries)
        part = self.objective.loss(batch, queries_BE, documents_ME, rows)
        if rows.start == rows.stop and not part.loss.requires_grad:  # every rank takes part in the backward pass
            part = part._replace(loss=part.loss + zero_of(queries_BE, documents_ME))
        return checked_part(part, self.objective)


def checked_part(part: LossPart, objective: Objective | type[Objective]) -> LossPart:
    """Return the part after checking that it can be reduced over the ranks and has a gradient.

    Raises:
        PyqembError: it cannot be reduced, or has no gradient; the error names the objective.
    """
    wrong = None
    if part.loss.ndim:
        wrong = f"the loss must be a scalar, got the shape {list(part.loss.shape)}"
    elif not part.loss.requires_grad:
        wrong = "the loss does not depend on the vectors"
    elif part.totals.ndim != 1:
        wrong = f"totals must have the shape [n], got {list(part.totals.shape)}"
    if wrong is not None:
        raise PyqembError(f"objective {objective.name!r}: {wrong}")
    return part


class StepLoader:
    """Loads the batch of each step, a pure function of the configuration, the data and the step."""

    def __init__(
        self,
        config: TrainConfig,
        datasets: Datasets,
        model: TextEncoder,
        parameters: LossParameters,
        world: World,
        teacher: Teacher | None = None,
        guide: Guide | None = None,
    ):
        self.loader = make_loader(datasets, config)
        self.steps = num_steps(config, self.loader)
        self._objectives = {name: each(config.loss, parameters) for name, each in datasets.objectives.items()}
        self._tokens = token_cache(config, model.tokenizer)
        self._model, self._world = model, world
        self._teacher, self._guide, self._weights = teacher, guide, datasets.loss_weights

    def load(self, step: int) -> StepBatch:
        """The batch of a step, counted from 0."""
        dataset, number = self.loader.where(step)
        objective = self._objectives[dataset]
        texts = objective.build_batch(self.loader.batch(step), self._model)
        partition = texts.text_partition(self._world.size)
        stream = self._tokens.pack([texts.texts[text] for text in partition[self._world.rank]])
        weights = self._weights.get(dataset, (1.0, 0.0))
        teacher = self._teacher if weights[1] else None
        return StepBatch(dataset, number, objective, texts, partition, stream, teacher, weights, guide=self._guide)


class StepStats(NamedTuple):
    """Sums over the ranks, before the backward pass."""

    loss: float
    stop: bool  # a rank has received a signal to stop
    tokens: int
    totals: Tensor  # of the objective's statistics

    @classmethod
    def reduce(cls, part: LossPart, stop: bool, tokens: int, world: World) -> "StepStats":
        """Sum the values of all ranks with one all-reduce."""
        facts = torch.tensor([float(part.loss.detach()), stop, tokens], dtype=torch.float64)
        message = torch.cat([facts, part.totals.cpu()]).to(part.loss.device)
        loss, stopping, tokens, *totals = world.all_reduce_(message).tolist()
        return cls(loss, stopping > 0, int(tokens), torch.tensor(totals, dtype=torch.float64))

    @property
    def is_finite(self) -> bool:
        """If the loss is not finite on any rank, the sum is not finite either."""
        return math.isfinite(self.loss)
