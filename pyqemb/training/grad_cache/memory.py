"""Free memory, peak memory, and failed allocations."""

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from pyqemb.ops import memory as kept_memory

_PAGE = os.sysconf("SC_PAGE_SIZE")
_M_MMAP_THRESHOLD = -3  # of malloc.h
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process could still allocate.

    This is the free memory of the GPU, or that of the machine and its control group (Linux), divided by the local
    ranks.

    Raises:
        ValueError: the system does not report it.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError as error:
        raise ValueError("memory='auto' needs /proc/meminfo; give a number of bytes here") from error
    free = next(int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable"))
    local_ranks = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    return min(free, _left_in_cgroup(free)) // local_ranks + kept_memory.kept_bytes()


def _left_in_cgroup(otherwise: int) -> int:
    with suppress(OSError, ValueError):
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return limit - used + int(stat.get("inactive_file", 0))  # the file cache can be reclaimed
    return otherwise


def used_bytes(device: torch.device) -> int:
    """The bytes that this process uses now; on the CPU without the buffer cache.

    0 if unknown.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _resident() - kept_memory.kept_bytes()


def give_back(device: torch.device) -> None:
    """Return the free memory of the allocators to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    kept_memory.release_kept()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def return_large_blocks() -> None:
    """Make the C library return every freed block of a megabyte or more to the system.

    By default glibc raises this threshold to up to 32 MB when such blocks are freed, and keeps smaller blocks in
    several arenas. Weights that are gathered and freed repeatedly then take several times their size.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def is_allocation_failure(error: BaseException) -> bool:
    """Whether an error is a failed allocation, on the CPU or on a GPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@dataclass
class CaughtError:
    """The allocation failure that `catch_oom` caught, or None."""

    error: BaseException | None = None


@contextmanager
def catch_oom() -> Iterator[CaughtError]:
    """Catch a failed allocation in the block; the yielded object then holds the error."""
    caught = CaughtError()
    try:
        yield caught
    except BaseException as error:
        if not is_allocation_failure(error):
            raise
        caught.error = error.with_traceback(None)  # its frames reference the memory that is needed


@contextmanager
def gradients_aside(tensors: Iterable[torch.Tensor]) -> Iterator[Callable[[], None]]:
    """Add the gradients of the block to the earlier ones at its end; drop them after an error.

    The yielded function drops them too.
    """
    tensors = list(tensors)
    before = [x.grad for x in tensors]

    def drop() -> None:
        for x in tensors:
            x.grad = None

    drop()
    try:
        yield drop
    except BaseException:
        drop()
        raise
    finally:
        with torch.no_grad():
            for x, old in zip(tensors, before, strict=True):
                if old is not None:
                    x.grad = old if x.grad is None else old.add_(x.grad)


class PeakMemory:
    """Measures the increase of memory over its start.

    Use it as `with PeakMemory(device) as peak`, or call `start()` and `stop()`; then read `peak_bytes`.

    On the CPU it is the high-water mark of the process in the operating system, or sampled if that cannot be reset. The
    free memory of the allocators is returned first, because it would hide a part of the increase. On a GPU it is
    torch's peak of allocated memory.
    """

    def __init__(self, device: torch.device):
        self.device, self.peak_bytes = device, 0

    def start(self) -> None:
        """Start measuring."""
        self._sampler: _Sampler | None = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            give_back(self.device)
            self._sampler = None if _reset_high_water() else _Sampler()
        self._start = used_bytes(self.device)

    def stop(self) -> None:
        """Stop measuring and set `peak_bytes`."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _high_water() if self._sampler is None else self._sampler.stop()
        self.peak_bytes = max(peak - self._start, 0)

    def __enter__(self) -> "PeakMemory":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Sampler:
    """The highest resident memory since its creation. Its thread ends with the object."""

    def __init__(self) -> None:
        self._peak, self._done = [_resident()], threading.Event()
        weakref.finalize(self, self._done.set)
        self._thread = threading.Thread(target=_sample, args=(self._peak, self._done), daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(*self._peak, _resident())


def _sample(peak: list[int], done: threading.Event) -> None:
    while not done.wait(0.002):
        peak[0] = max(peak[0], _resident())


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except OSError:
        return 0


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _high_water() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
