"""Timing against a peer: both in one process, interleaved, so that a busy machine slows both alike."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """Medians in seconds; `ratio` is how many times as long the peer takes."""

    name: str
    peer: str
    ours_seconds: float
    peer_seconds: float
    gflop: float = 0.0

    @property
    def ratio(self) -> float:
        return self.peer_seconds / self.ours_seconds

    def row(self) -> str:
        """A Markdown table row: case, peer, milliseconds of both, our GFLOP/s, ratio."""
        speed = f"{self.gflop / self.ours_seconds:.0f}" if self.gflop else "-"
        times = f"{1e3 * self.ours_seconds:.1f} | {1e3 * self.peer_seconds:.1f}"
        return f"| {self.name} | {self.peer} | {times} | {speed} | {self.ratio:.2f}x |"


HEADER = "| case | peer | ours ms | peer ms | ours GFLOP/s | ratio |\n| --- | --- | --- | --- | --- | --- |"


def versus(
    name: str, peer: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 7, gflop: float = 0.0
) -> Comparison:
    """Time `ours` and `theirs` in turn, `rounds` times after one warm-up, and compare medians."""
    samples: tuple[list[float], list[float]] = ([], [])
    for measured in range(-1, rounds):
        for function, times in zip((ours, theirs), samples, strict=True):
            start = time.perf_counter()
            function()
            if measured >= 0:
                times.append(time.perf_counter() - start)
    return Comparison(name, peer, statistics.median(samples[0]), statistics.median(samples[1]), gflop)
