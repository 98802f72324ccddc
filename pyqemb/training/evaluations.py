"""Evaluations during training: the best one, and early stopping."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from pyqemb.errors import ConfigError
from pyqemb.model.embedder import Embedder
from pyqemb.model.reranker import Reranker
from pyqemb.training.config import EvalSection
from pyqemb.training.parallel.together import together
from pyqemb.training.parallel.world import World

Evaluate = Callable[[Embedder | Reranker], Mapping[str, float]]


class Evaluations:
    """The evaluations of a run.

    Attributes:
        results: the finite metrics of the last evaluation, for the model card.
        best: {"metric", "value", "step"} of the best one.
        since_best: the number of evaluations after the best one.
    """

    def __init__(self, section: EvalSection, evaluate: Evaluate | None):
        self.section, self.evaluate = section, evaluate
        self.results: dict[str, float] = {}
        self.best: dict[str, Any] | None = None
        self.since_best = 0

    def due(self, step: int, steps: int) -> bool:
        """Whether to evaluate after a step."""
        every = self.section.every
        return self.evaluate is not None and (step == steps or (every is not None and step % every == 0))

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `eval.patience` evaluations were not better than the best one."""
        return self.section.patience is not None and self.since_best >= self.section.patience

    def measure(self, model: Embedder | Reranker, world: World) -> dict[str, float]:
        """Evaluate a model on all ranks, which share its forward passes; returns the metrics of rank 0 by name.

        Raises:
            RankError: `evaluate` raised on another rank. ConfigError: the ranks encode different texts.
        """
        assert self.evaluate is not None
        model.eval()
        with together(world) as ranks, model.encoding_on(ranks) if world.size > 1 else nullcontext():
            values = {name: float(value) for name, value in self.evaluate(model).items()}
        model.train()
        values = world.broadcast_object(values)
        self.results = {name: value for name, value in values.items() if math.isfinite(value)}
        return values

    def is_best(self, values: Mapping[str, float], step: int) -> bool:
        """Whether these metrics are the best so far; counts the evaluation.

        ConfigError if eval.metric is missing.
        """
        metric = self.section.metric or next(iter(values), None)
        if metric is None:
            return False
        if metric not in values:
            raise ConfigError(f"eval.metric: {metric!r} is not among the measured metrics: {', '.join(values)}")
        value, before = values[metric], None if self.best is None else self.best["value"]
        better = before is None or (value > before if self.section.mode == "max" else value < before)
        if math.isfinite(value) and better:
            self.best, self.since_best = {"metric": metric, "value": value, "step": step}, 0
            return True
        self.since_best += 1
        return False
