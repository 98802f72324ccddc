"""The progress display of a run: a bar and tables on a terminal, lines elsewhere, or JSON."""

import json
import resource
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

import torch

from pyqemb.errors import ConfigError
from pyqemb.training.callbacks.base import Callback, Row, RowLogger, TrainInfo

if TYPE_CHECKING:
    from pyqemb.training.trainer import TrainResult

_WINDOW = 30  # steps over which speed is averaged
# Values of a row: their labels and formats, on a terminal and elsewhere.
_SHORT = {"loss": ("loss", ".3f"), "positive": ("pos", ".2f"), "negative": ("neg", ".2f")}
_LONG = _SHORT | {
    "masked": ("masked", ".1%"), "teacher": ("teacher", ".3f"), "grad_norm": ("grad", ".2f"),
    "learning_rate": ("lr", ".1e"),
}  # fmt: skip


class Throughput:
    """Tokens per second over the last steps."""

    def __init__(self) -> None:
        self._tokens = 0
        self._times: deque[tuple[float, int]] = deque([(time.perf_counter(), 0)], maxlen=_WINDOW)

    def count(self, tokens: int) -> float:
        """Add a step's tokens; returns tokens per second."""
        self._tokens += tokens
        self._times.append((time.perf_counter(), self._tokens))
        (first, before), (last, now) = self._times[0], self._times[-1]
        return (now - before) / max(last - first, 1e-9)

    @property
    def seconds_per_step(self) -> float:
        """The mean seconds of the last steps."""
        return (self._times[-1][0] - self._times[0][0]) / max(len(self._times) - 1, 1)


class ProgressDisplay(RowLogger):
    """Shows a run on standard error: a bar and tables on a terminal, elsewhere a line for each row."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self._bar: Any = None  # a progress bar of rich, on a terminal
        self._values: dict[str, float] = {}  # of the last evaluation

    def on_train_begin(self, info: TrainInfo) -> None:
        super().on_train_begin(info)
        self._speed = Throughput()
        print("\n".join(header(info)), file=self.stream, flush=True)
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[text]}")
            self._bar = Progress(*columns, console=Console(file=self.stream), expand=True, refresh_per_second=4)
            self._task = self._bar.add_task(f"{info.step}/{info.steps}", total=info.steps, completed=info.step, text="")
            self._bar.start()

    def on_step_end(self, row: Row) -> None:
        self._speed.count(row["tokens"])
        if self._bar is not None:
            text = "skipped" if row.get("skipped") else self._text(row, _SHORT)
            self._bar.update(self._task, description=self._count(row), completed=row["step"], text=text)
        super().on_step_end(row)

    def log(self, row: Row) -> None:
        if "eval" in row:
            self._show_evaluation(row)
        elif row.get("skipped"):
            self._show(f"step {self._count(row)}  skipped: its loss or gradient is not finite")
        elif self._bar is None:
            self._show(f"step {self._count(row)}  {self._text(row, _LONG)}  mem {memory_mb():,.0f} MB")

    def on_train_end(self, result: "TrainResult | None") -> None:
        if self._bar is not None:
            self._bar.stop()

    def _show(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), line, file=self.stream, flush=True)

    def _show_evaluation(self, row: Row) -> None:
        values, before = row["eval"], self._values
        self._values = {name: value for name, value in values.items() if value is not None}
        text = {name: "not finite" if value is None else f"{value:.4f}" for name, value in values.items()}
        if self._bar is None:
            self._show("  ".join([f"step {self._count(row)}  evaluation", *map(" ".join, text.items())]))
            return
        from rich.table import Table

        table = Table("metric", "value", "change", title=f"evaluation, step {self._count(row)}", title_justify="left")
        for name in values:
            known = name in before and name in self._values
            table.add_row(name, text[name], f"{values[name] - before[name]:+.4f}" if known else "")
        self._bar.console.print(table)

    def _count(self, row: Row) -> str:
        return f"{row['step']}/{self._steps}"

    def _text(self, row: Row, names: Mapping[str, tuple[str, str]]) -> str:
        """The values of a step that was not skipped, and the remaining time."""
        found = [f"{label} {row[name]:{kind}}" for name, (label, kind) in names.items() if name in row]
        remaining = self._speed.seconds_per_step * (self._steps - row["step"])
        return "  ".join([*found, f"{row['tokens_per_second']:,} tok/s", f"ETA {_clock(remaining)}"])


class JsonRows(RowLogger):
    """Prints the logged rows of metrics.jsonl on standard output."""

    def log(self, row: Row) -> None:
        print(json.dumps(row), flush=True)


def progress_callbacks(progress: str) -> list[Callback]:
    """The callbacks of `train(progress=...)`. ConfigError for an unknown value."""
    kinds: dict[str, list[type[Callback]]] = {"auto": [ProgressDisplay], "json": [JsonRows], "off": []}
    if progress not in kinds:
        raise ConfigError(f"progress: expected 'auto', 'json' or 'off', got {progress!r}")
    return [kind() for kind in kinds[progress]]


def header(info: TrainInfo) -> list[str]:
    """The lines before the first step: model, task, device, run folder and number of steps."""
    config = info.config
    plan = f"{info.steps:,} steps of {config.train.global_batch_size:,} examples"
    if config.eval.every:
        plan += f", evaluated every {config.eval.every:,}"
    if config.save.every:
        plan += f", saved every {config.save.every:,}"
    if info.step:
        plan += f"; continues after step {info.step:,}"
    method = "" if config.lora is None else f", LoRA of rank {config.lora.rank}"
    return [
        f"model   {config.model.base}", f"task    {config.task}{method}", f"device  {info.device}",
        f"folder  {info.folder}", f"plan    {plan}",
    ]  # fmt: skip


def memory_mb() -> float:
    """The peak memory of this process in MB; GPU memory if it uses a GPU."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}" if hours else f"{minutes}:{rest:02}"
