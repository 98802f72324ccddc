"""The hooks of a training run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyqemb.data.arguments import checked
from pyqemb.training.config import TrainConfig

if TYPE_CHECKING:
    from pyqemb.training.trainer import TrainResult

Row = dict[str, Any]  # a row of metrics.jsonl
OnStep = Callable[[Row], None]


@dataclass(frozen=True)
class TrainInfo:
    """Information about a run before its first step."""

    config: TrainConfig
    folder: Path  # the run folder, save.dir
    steps: int  # the number of steps of the whole run
    step: int = 0  # steps done already: above 0 if the run is resumed
    device: str = "cpu"


class Callback:
    """Hooks that `pyqemb.train(config, callbacks=[...])` calls. Override those that you need.

    Only rank 0 calls them, in the order of the list, after the built-in ones: metrics.jsonl, the loggers of `log.to`,
    the progress display. If a hook raises an exception, a checkpoint is saved, and the exception propagates to the
    caller of `train`; the other ranks raise a RankError.

    Example:
        >>> class Best(Callback):
        ...     loss = float("inf")
        ...     def on_step_end(self, row):
        ...         self.loss = min(self.loss, row["loss"] or self.loss)
    """

    def on_train_begin(self, info: TrainInfo) -> None:
        """Before the first step, after all checks."""

    def on_step_end(self, row: Row) -> None:
        """After each step, with its row of metrics.jsonl; `row["loss"]` is None if the step was skipped."""

    def on_evaluate(self, row: Row) -> None:
        """After an evaluation, with its row: `{"step": 4, "eval": {"ndcg@10": 0.5}}`."""

    def on_save(self, step: int, folder: Path) -> None:
        """After a checkpoint was written to `folder` and verified."""

    def on_train_end(self, result: "TrainResult | None") -> None:
        """Once at the end, also after an exception or an interruption: then `result` is None."""

    def describe(self, hook: str) -> str:
        """The name of a hook in messages about its exceptions."""
        return f"{type(self).__name__}.{hook}"


class StepFunction(Callback):
    """The function `on_step` of `pyqemb.train` as a callback."""

    @checked
    def __init__(self, on_step: OnStep):
        self._on_step = on_step

    def on_step_end(self, row: Row) -> None:
        self._on_step(row)

    def describe(self, hook: str) -> str:
        return "on_step"


class RowLogger(Callback):
    """Logs evaluations, and the rows of every `train.log_every`-th step, of the last and of skipped ones."""

    def on_train_begin(self, info: TrainInfo) -> None:
        self._every, self._steps = info.config.train.log_every, info.steps

    def on_step_end(self, row: Row) -> None:
        if row["step"] % self._every == 0 or row["step"] == self._steps or row.get("skipped"):
            self.log(row)

    def on_evaluate(self, row: Row) -> None:
        self.log(row)

    def log(self, row: Row) -> None:
        """Write one row. A subclass defines it."""
        raise NotImplementedError
