"""Timing on a GPU against peers: events, cold caches, all contenders in turn.

On the CPU the same code with a wall clock.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyqemb import _C

Work = Callable[[], Any]
Function = Callable[..., Any]
_COLD_BYTES = 256 << 20  # more than any L2 cache
_AHEAD_CYCLES = 2_000_000  # about a millisecond, in which the host issues the work that is then timed
OURS = "pyqemb"


@contextmanager
def newest_kernels(capability: int) -> Iterator[None]:
    """Kernels for architectures newer than this (80, 90) are left alone: Hopper's against those that run everywhere."""
    before = _C.set_newest_kernels(capability)
    try:
        yield
    finally:
        _C.set_newest_kernels(before)


def on_older_kernels(prepare: Callable[[], Work], capability: int = 80) -> Callable[[], Work]:
    """A contender that works with the kernels of an older architecture."""

    def prepare_there() -> Work:
        with newest_kernels(capability):
            work = prepare()

        def work_there() -> Any:
            with newest_kernels(capability):
                return work()

        return work_there

    return prepare_there


@dataclass(frozen=True)
class Result:
    """Medians of one contender, in seconds; `difference` is that of its outputs from ours, relative to their size."""

    seconds: float
    host_seconds: float
    extra_bytes: int
    difference: float | None


@dataclass(frozen=True)
class Measurement:
    """One case. `notes` says why a contender is missing. Ceilings: GFLOP/s of a matrix product, GB/s of a copy."""

    family: str
    case: str
    results: dict[str, Result]
    notes: dict[str, str]
    gemm: float
    copy: float
    gflop: float = 0.0
    gbyte: float = 0.0

    def rows(self) -> list[str]:
        """Markdown table rows, one for each contender."""
        ours = self.results[OURS].seconds
        rows = []
        for name, x in self.results.items():
            flops, bytes_ = self.gflop / x.seconds, self.gbyte / x.seconds
            speed = f"{flops / 1e3:.3g} | {flops / self.gemm:.0%}" if flops else "- | -"
            speed += f" | {bytes_:.0f} | {bytes_ / self.copy:.0%}" if bytes_ else " | - | -"
            ratio = "" if name == OURS else f"{x.seconds / ours:.2f}x"
            difference = "-" if x.difference is None or name == OURS else f"{x.difference:.1e}"
            rows.append(
                f"| {self.case} | {name} | {1e3 * x.seconds:.3f} | {speed} | {1e6 * x.host_seconds:.0f} "
                f"| {x.extra_bytes / 2**20:.0f} | {ratio} | {difference} |"
            )
        return rows + [f"| {self.case} | {name} | {note} | | | | | | | | |" for name, note in self.notes.items()]


HEADER = (
    "| case | who | ms | TFLOP/s | of GEMM | GB/s | of copy | host us | extra MiB | time / ours | differs by |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


class Meter:
    """Measures on one device."""

    def __init__(self, device: torch.device, rounds: int = 20):
        self.device, self.rounds, self.on_gpu = device, rounds, device.type == "cuda"
        self._cold = torch.empty(_COLD_BYTES if self.on_gpu else 0, dtype=torch.uint8, device=device)
        self._copies = [
            torch.zeros(_COLD_BYTES if self.on_gpu else 1 << 16, dtype=torch.uint8, device=device) for _ in "ab"
        ]
        self._factors: dict[torch.dtype, list[Tensor]] = {}

    def seconds(self, work: Work) -> float:
        """Time on the device of one call, with nothing of its inputs in the caches."""
        if not self.on_gpu:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        self._cold.zero_()
        torch.cuda._sleep(_AHEAD_CYCLES)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def host_seconds(self, work: Work, calls: int) -> float:
        """Time that the caller spends on one call while the device keeps up or not."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        elapsed = time.perf_counter() - start
        self.synchronize()
        return elapsed / calls

    def extra_bytes(self, work: Work) -> int:
        """Device memory that a call needs on top of what is allocated; 0 on the CPU."""
        if not self.on_gpu:
            return 0
        gc.collect()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def synchronize(self) -> None:
        """Wait until the device has finished all work."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def ceilings(self, dtype: torch.dtype) -> tuple[tuple[Work, float], tuple[Work, float]]:
        """(work, GFLOP) of a large matrix product in that dtype, (work, GB) of a large copy."""
        size = 8192 if self.on_gpu else 128
        if dtype not in self._factors:
            self._factors[dtype] = [torch.rand(size, size, device=self.device).to(dtype) for _ in range(3)]
        (a, b, c), (source, target) = self._factors[dtype], self._copies
        return (lambda: torch.mm(a, b, out=c), 2 * size**3 / 1e9), (lambda: target.copy_(source), 2 * len(source) / 1e9)

    def measure(
        self,
        family: str,
        case: str,
        contenders: Mapping[str, Callable[[], Work]],
        *,
        dtype: torch.dtype,
        gflop: float = 0.0,
        gbyte: float = 0.0,
        rounds: int | None = None,
        host_calls: int = 10,
    ) -> Measurement:
        """Each round calls both ceilings and every contender once.

        A contender is a function that prepares its work (imports, compiles, allocates) and returns it; the work returns
        tensors. Peers that fail become notes; ours may not fail.
        """
        ready: dict[str, tuple[Work, float, int, float | None]] = {}
        notes: dict[str, str] = {}
        reference: list[Tensor] = []
        for name, prepare in contenders.items():
            try:
                work = prepare()
                outputs = _tensors(work())
                reference = reference or [x.clone() for x in outputs]
                difference = _difference(outputs, reference)
                del outputs
                ready[name] = work, self.host_seconds(work, host_calls), self.extra_bytes(work), difference
            except Exception as error:
                if name == OURS:
                    raise
                notes[name] = _first_line(error)
                if self.on_gpu:  # what it has left may be most of the memory
                    gc.collect()
                    torch.cuda.empty_cache()
        (gemm, flops), (copy, bytes_) = self.ceilings(dtype)
        works = {"gemm": gemm, "copy": copy, **{f"+{name}": entry[0] for name, entry in ready.items()}}
        samples: dict[str, list[float]] = {name: [] for name in works}
        for work in works.values():
            work()
        for _ in range(rounds or self.rounds):
            for name, work in works.items():
                samples[name].append(self.seconds(work))
        median = {name: statistics.median(times) for name, times in samples.items()}
        results = {name: Result(median[f"+{name}"], *entry[1:]) for name, entry in ready.items()}
        return Measurement(family, case, results, notes, flops / median["gemm"], bytes_ / median["copy"], gflop, gbyte)


@dataclass
class Report:
    """What a run found: one table, and everything as JSON."""

    title: str
    environment: Mapping[str, Any]
    found: list[Measurement] = field(default_factory=list)

    def table(self) -> str:
        """Return the Markdown table of all measurements."""
        return "\n".join([HEADER, *(row for x in self.found for row in x.rows())])

    def write(self, folder: Path, name: str) -> None:
        """Write NAME.md and NAME.json into the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        facts = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        text = (
            f"# {self.title}\n\n{facts}.\n\nMedians of interleaved rounds in one process, times on the device by "
            "events, caches cold. Ceilings are a matrix product of 8192 in the case's dtype and a copy of 256 MiB, "
            "timed in the same rounds. Host: the caller's time a call. Extra: device memory on top of the inputs. The "
            "last column is the difference of "
            f"the outputs from ours.\n\n{self.table()}\n"
        )
        (folder / f"{name}.md").write_text(text)
        record = {"environment": dict(self.environment), "measurements": [asdict(x) for x in self.found]}
        (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def forward(
    functions: Mapping[str, Callable[[], Function]], tensors: Sequence[Tensor]
) -> dict[str, Callable[[], Work]]:
    """Contenders that call each function on the tensors, as in training: with a graph."""

    def prepare(make: Callable[[], Function]) -> Callable[[], Work]:
        def ready() -> Work:
            function = make()
            return lambda: function(*tensors)

        return ready

    return {name: prepare(make) for name, make in functions.items()}


def backward(
    functions: Mapping[str, Callable[[], Function]], tensors: Sequence[Tensor]
) -> dict[str, Callable[[], Work]]:
    """Contenders that take the gradient of each function's outputs at the tensors; the forward pass is not timed."""

    def prepare(make: Callable[[], Function]) -> Callable[[], Work]:
        def ready() -> Work:
            outputs = _tensors(make()(*tensors))
            generator = torch.Generator().manual_seed(0)
            directions = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
            return lambda: torch.autograd.grad(outputs, tensors, directions, retain_graph=True)

        return ready

    return {name: prepare(make) for name, make in functions.items()}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:120].replace("|", "/")


def _tensors(outputs: Any) -> list[Tensor]:
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return [x for x in outputs if isinstance(x, Tensor)]


@torch.no_grad()
def _difference(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> float | None:
    if not outputs or [x.shape for x in outputs] != [x.shape for x in reference]:
        return None
    return max(
        float((x.float() - y.float()).norm() / y.float().norm().clamp_min(1e-30))
        for x, y in zip(outputs, reference, strict=True)
    )
