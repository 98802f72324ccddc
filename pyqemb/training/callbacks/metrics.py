"""metrics.jsonl: one row for each logged step and evaluation."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pyqemb.data.files import atomic_file, fsync_folder
from pyqemb.data.machine import reading, writing
from pyqemb.errors import MachineError
from pyqemb.training.callbacks.base import Row, RowLogger, TrainInfo

if TYPE_CHECKING:
    from pyqemb.training.trainer import TrainResult


class MetricsFile(RowLogger):
    """Appends rows to the file; a resumed run first removes the rows after its step."""

    def on_train_begin(self, info: TrainInfo) -> None:
        super().on_train_begin(info)
        self.path = info.folder / "metrics.jsonl"
        truncate_metrics(self.path, info.step)
        with writing(self.path):
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
            fsync_folder(self.path.parent)  # the name of a new file survives a power failure
        self._lost = False  # a row could not be written

    def log(self, row: Row) -> None:
        """Write one row. MachineError if it cannot be written."""
        with self._writing():
            self._file.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """Flush the rows to the disk, because a checkpoint must not be newer than its metrics.

        MachineError if they cannot be flushed. After an error it does nothing: a checkpoint without its metrics is
        better than no checkpoint.
        """
        if not self._lost:
            with self._writing():
                self._file.flush()
                os.fsync(self._file.fileno())

    def on_train_end(self, result: "TrainResult | None") -> None:
        with suppress(OSError) if self._lost else writing(self.path):  # closing tries to write the lost row again
            self._file.close()

    def describe(self, hook: str) -> str:
        return "writing metrics.jsonl"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with writing(self.path):
                yield
        except MachineError:
            self._lost = True
            raise


def truncate_metrics(path: Path, step: int) -> None:
    """Remove the rows after `step`, which a resumed run writes again, and a partial last line."""
    if not path.exists():
        return
    kept = []
    with reading(path):
        content = path.read_bytes()
    for line in content.split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
            kept.append(line + b"\n")
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"".join(kept))
