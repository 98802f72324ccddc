"""The progress display: a live line on a terminal, JSON lines elsewhere."""

import json
import resource
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TextIO

import torch

from pyqemb.training.callbacks.base import Row, RowLogger, TrainInfo

if TYPE_CHECKING:
    from pyqemb.training.trainer import TrainResult

_WINDOW = 30  # steps over which speed is averaged
_STATISTICS = {"positive": ("pos", ".2f"), "negative": ("neg", ".2f"), "masked": ("masked", ".1%")}


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
    """Shows the rows on standard error."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self._live: Any = None  # of rich, on a terminal

    def on_train_begin(self, info: TrainInfo) -> None:
        super().on_train_begin(info)
        self._speed = Throughput()
        if self.stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self.stream), refresh_per_second=4)
            self._live.start()

    def on_step_end(self, row: Row) -> None:
        self._speed.count(row["tokens"])
        super().on_step_end(row)

    def log(self, row: Row) -> None:
        if self._live is None:
            print(json.dumps(row), file=self.stream, flush=True)
        elif row.get("loss") is None:
            self._live.console.print(json.dumps(row), markup=False, highlight=False)
        else:
            self._live.update(self.line(row))

    def on_train_end(self, result: "TrainResult | None") -> None:
        if self._live is not None:
            self._live.stop()

    def line(self, row: Row) -> str:
        """The live line of a step's row."""
        statistics = "".join(
            f"{label} {row[name]:{kind}} " for name, (label, kind) in _STATISTICS.items() if name in row
        )
        remaining = self._speed.seconds_per_step * (self._steps - row["step"])
        return (
            f"step {row['step']}/{self._steps}  loss {row['loss']:.3f}  {statistics} grad {row['grad_norm']:.2f}  "
            f"lr {row['learning_rate']:.1e}  {row['tokens_per_second']:,.0f} tok/s (0% pad)  "
            f"mem {memory_mb():,.0f} MB  ETA {_clock(remaining)}"
        )


def memory_mb() -> float:
    """The most memory this process has held, in MB: of the GPU where it uses one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}" if hours else f"{minutes}:{rest:02}"
