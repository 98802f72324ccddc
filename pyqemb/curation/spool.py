"""Temporary storage of examples on disk, for steps that need all examples before they judge one."""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from pyqemb.data.example import Example, to_row
from pyqemb.data.files import locked, remove, remove_folder
from pyqemb.errors import MachineError


class Spool:
    """A file of examples that `fill` writes once and that can be read repeatedly."""

    def __init__(self, folder: Path):
        self._path = folder / "examples.jsonl"
        self._count = 0

    def fill(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Yield each example as it is written."""
        with self._path.open("wb") as file:
            for example in examples:
                file.write(json.dumps(to_row(example)).encode() + b"\n")
                self._count += 1
                yield example

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Example]:
        with self._path.open("rb") as file:
            for line in file:
                row: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(line).items()}
                yield Example(**row)


@contextmanager
def run_folder(out: Path) -> Iterator[Path]:
    """The folder of a run's temporary files, beside its results in `out`, because that disk has space.

    Only one process may use it: a ConfigError names the process that does. It is removed at the end; what a killed
    process left in it is removed at the start.
    """
    folder = out / ".work"
    with locked(folder, "curation"):
        for leftover in folder.iterdir():
            if leftover.name != ".lock":
                remove(leftover)
        try:
            yield folder
        finally:
            with suppress(MachineError):
                remove_folder(folder)


@contextmanager
def work_folder(inside: Path | None) -> Iterator[Path]:
    """A new temporary folder for one step, in `inside` or else where the system has its temporary files."""
    with tempfile.TemporaryDirectory(dir=inside, prefix="step-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def windows(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """Yield lists of `size` examples; the last one may be shorter."""
    window: list[Example] = []
    for example in examples:
        window.append(example)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def text_hash(text: str) -> int:
    """A 64-bit hash of the characters of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Seen:
    """A growing set of 64-bit hashes, 8 bytes each: sorted runs, merged when one is no longer than the next."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add hashes and return which of them are new.

        Args:
            hashes: uint64 [N]; of equal hashes only the first can be new.

        Returns:
            bool [N].
        """
        distinct, first = np.unique(hashes, return_index=True)
        known = np.zeros(len(distinct), dtype=bool)
        for run in self._runs:
            known |= run[np.searchsorted(run, distinct).clip(max=len(run) - 1)] == distinct
        new = np.zeros(len(hashes), dtype=bool)
        new[first[~known]] = True
        self._runs.append(distinct[~known])
        while len(self._runs) > 1 and len(self._runs[-2]) <= len(self._runs[-1]):
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]), kind="stable")]
        self._runs = [run for run in self._runs if len(run)]
        return new
