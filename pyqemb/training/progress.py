"""What a run says while it runs: metrics.jsonl always, a live line on a terminal, JSON lines elsewhere, TensorBoard on request."""

import json
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from pyqemb.data.files import atomic_file
from pyqemb.errors import ConfigError, MachineError

_WINDOW = 30  # steps over which speed is averaged


class Progress:
    """Receives each step's numbers. Use as a context manager."""

    def __init__(
        self, folder: Path, steps: int, start: int = 0, tensorboard: bool = False, stream: TextIO | None = None
    ):
        self.steps, self.stream = steps, stream or sys.stderr
        self.path = folder / "metrics.jsonl"
        truncate_metrics(self.path, start)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._times: deque[tuple[float, int]] = deque([(time.perf_counter(), 0)], maxlen=_WINDOW)
        self._tokens = 0
        self._lost = False  # a row could not be written
        self._board = _open_board(folder) if tensorboard else None
        self._live: Any = None

    def __enter__(self) -> "Progress":
        if self.stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self.stream), refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        if self._board is not None:
            self._board.close()
        with suppress(OSError) if self._lost else nullcontext():  # closing writes the lost row once more
            self._file.close()

    def count(self, tokens: int) -> float:
        """Take note of a step's tokens; returns tokens per second."""
        self._tokens += tokens
        self._times.append((time.perf_counter(), self._tokens))
        (first, before), (last, now) = self._times[0], self._times[-1]
        return (now - before) / max(last - first, 1e-9)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write one row of metrics. MachineError where it cannot be written."""
        line = json.dumps(row)
        try:
            self._file.write(line + "\n")
        except OSError as error:
            self._lost = True
            raise MachineError(f"{self.path}: cannot be written: {error.strerror}") from error
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, row["step"])
        if self._live is None:
            print(line, file=self.stream, flush=True)
        else:
            self._live.update(self.line(row)) if "loss" in row else self.say(line)

    def sync(self) -> None:
        """Put the rows so far on the disk: a checkpoint must not be newer than its metrics. After a lost row nothing is written:
        a checkpoint without its metrics is better than no checkpoint.
        """
        if self._lost:
            return
        self._file.flush()
        os.fsync(self._file.fileno())

    def say(self, text: str) -> None:
        """A message between the lines."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(json.dumps({"message": text}), file=self.stream, flush=True)

    def line(self, row: Mapping[str, Any]) -> str:
        """The live line of a step's row."""
        (first, _), (last, _) = self._times[0], self._times[-1]
        seconds = (last - first) / max(len(self._times) - 1, 1) * (self.steps - row["step"])
        return (
            f"step {row['step']}/{self.steps}  loss {row['loss']:.3f}  pos {row['positive']:.2f} "
            f"neg {row['negative']:.2f}  masked {row['masked']:.1%}  grad {row['grad_norm']:.2f}  "
            f"lr {row['learning_rate']:.1e}  {row['tokens_per_second']:,.0f} tok/s (0% pad)  "
            f"mem {memory_mb():,.0f} MB  ETA {_clock(seconds)}"
        )


class Silence(Progress):
    """For all processes but the first: nothing is written or said."""

    def __init__(self) -> None:
        self._times = deque([(time.perf_counter(), 0)], maxlen=_WINDOW)
        self._tokens = 0

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def log(self, row: Mapping[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the rows up to `step` (a resumed run writes the later ones again), drop a half-written last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
            kept.append(line + b"\n")
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"".join(kept))


def memory_mb() -> float:
    """The most memory this process has held, in MB: of the GPU where it uses one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _open_board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("train.tensorboard needs TensorBoard: pip install 'pyqemb[tensorboard]'") from error
    return SummaryWriter(str(folder / "tensorboard"))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}" if hours else f"{minutes}:{rest:02}"
