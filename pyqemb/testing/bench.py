"""Timing against peers: all in one process, interleaved, so that a busy machine slows all alike."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pyqemb.training.grad_cache.memory import PeakMemory

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Median seconds of a call, and how many bytes the process grew by while it ran."""

    seconds: float
    extra_bytes: int


@dataclass(frozen=True)
class Comparison:
    """One case: ours, its peers, and the machine's ceiling measured in between (GFLOP/s, or GB/s for `gbyte`)."""

    family: str
    case: str
    ours: Timing
    peers: dict[str, Timing]
    ceiling: float
    gflop: float = 0.0
    gbyte: float = 0.0

    @property
    def speed(self) -> float:
        """GFLOP/s, or GB/s, of ours."""
        return (self.gflop or self.gbyte) / self.ours.seconds

    def ratio(self, peer: str) -> float:
        """How many times as long the peer takes."""
        return self.peers[peer].seconds / self.ours.seconds

    def rows(self) -> list[str]:
        """Markdown table rows, one for each peer."""
        unit = "GFLOP/s" if self.gflop else "GB/s"
        speed = f"{self.speed:.0f} {unit} | {self.speed / self.ceiling:.0%}" if self.gflop or self.gbyte else "- | -"
        ours = f"{1e3 * self.ours.seconds:.1f} | {self.ours.extra_bytes / 2**20:.0f} | {speed}"
        rows = [
            f"| {self.case} | {ours} | {name} | {1e3 * peer.seconds:.1f} | {peer.extra_bytes / 2**20:.0f} | "
            f"{self.ratio(name):.2f}x |"
            for name, peer in self.peers.items()
        ]
        return rows or [f"| {self.case} | {ours} | none | - | - | - |"]

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        return {**asdict(self), "ratios": {name: self.ratio(name) for name in self.peers}}


HEADER = (
    "| case | ours ms | ours extra MiB | speed | of ceiling | peer | peer ms | peer extra MiB | ratio |\n"
    "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |"
)


# (ours, before each round, rounds) -> seconds of ours in each round
Clock = Callable[[Work, Callable[[], None], int], list[float]]


def compare(
    family: str,
    case: str,
    ours: Work,
    peers: Mapping[str, Work],
    *,
    clock: Clock,
    rounds: int = 7,
    gflop: float = 0.0,
    gbyte: float = 0.0,
) -> Comparison:
    """Each round calls the ceiling, every peer and, timed by `clock`, ours; medians.

    A first call warms up and shows the memory.
    """
    ceiling, amount = _copy() if gbyte else _gemm()
    extra = {name: peak_bytes(work) for name, work in {"": ours, **peers}.items()}
    others = {"": ceiling, **peers}
    samples: dict[str, list[float]] = {name: [] for name in others}
    ceiling()

    def others_round() -> None:
        for name, work in others.items():
            samples[name].append(_seconds(work))

    own = clock(ours, others_round, rounds)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    return Comparison(
        family, case, Timing(statistics.median(own), extra[""]),
        {name: Timing(medians[name], extra[name]) for name in peers}, amount / medians[""], gflop, gbyte,
    )  # fmt: skip


def _seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_bytes(work: Work) -> int:
    """How far the memory of the process rises above its start while `work` runs."""
    gc.collect()
    with PeakMemory(torch.device("cpu")) as peak:
        work()
    return peak.peak_bytes


def _gemm(size: int = 1536) -> tuple[Work, float]:
    a, b, c = (torch.rand(size, size) for _ in range(3))
    return lambda: torch.mm(a, b, out=c), 2 * size**3 / 1e9


def _copy(count: int = 32 << 20) -> tuple[Work, float]:
    source, target = torch.zeros(count), torch.zeros(count)
    return lambda: target.copy_(source), 2 * 4 * count / 1e9
