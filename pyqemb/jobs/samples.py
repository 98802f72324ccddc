"""What the plan of a job measures: the speed of work on a sample, the memory of this process, the room on a disk."""

import resource
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, in order and spread evenly. There must be at least one item."""
    return [items[place] for place in np.unique(np.linspace(0, len(items) - 1, most).astype(int))]


def timed(work: Callable[[list[T]], Any], sample: list[T], batch: int, seconds: float) -> tuple[int, float]:
    """Do the work of a sample, `batch` items at a time, at least once, and no more after `seconds`.

    Returns:
        The number of items that were done, and the seconds that they took.
    """
    done, start = 0, time.perf_counter()
    while done < len(sample) and (not done or time.perf_counter() - start < seconds):
        work(sample[done : done + batch])
        done = min(done + batch, len(sample))
    return done, time.perf_counter() - start


def peak_memory() -> int:
    """The largest number of bytes that this process has had in memory."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def free_space(path: Path) -> int:
    """The bytes that are free on the disk of a file or folder, which need not exist."""
    return shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free
