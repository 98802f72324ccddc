"""How much memory there is, how much a piece of work took, and what to do when an allocation failed."""

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import torch

from pyqemb.ops import memory as kept_memory

_PAGE = os.sysconf("SC_PAGE_SIZE")
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """What this process could still take: of the GPU, or of the machine and its control group (Linux), shared by its local ranks.

    Raises:
        ValueError: the system does not tell.
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
        return limit - used + int(stat.get("inactive_file", 0))  # cached files give way
    return otherwise


def used_bytes(device: torch.device) -> int:
    """What this process holds now; on the CPU without the blocks that are kept for the next results. 0 where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _resident() - kept_memory.kept_bytes()


def give_back(device: torch.device) -> None:
    """Return to the system what is free inside the allocators."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    kept_memory.release_kept()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def is_allocation_failure(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class Attempt:
    """`with Attempt() as attempt`: an allocation failure ends the block quietly and is `attempt.failed`."""

    failed: BaseException | None = None

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if error is None or not is_allocation_failure(error):
            return False
        self.failed = error.with_traceback(None)  # its frames hold the memory that is wanted
        return True


@contextmanager
def gradients_aside(tensors: Iterable[torch.Tensor]) -> Iterator[Callable[[], None]]:
    """Gradients made inside are added at the end to those from before; an error drops them. What it yields drops them too."""
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


class Meter:
    """`with Meter(device) as meter`: afterwards `meter.peak_bytes` is how far the memory rose above its start.

    On the CPU it is the kernel's high-water mark of the process, sampled where that cannot be set back; the allocators' free memory
    is given back first, or it would hide what the work needs. On a GPU it is what torch has allocated at most.
    """

    def __init__(self, device: torch.device):
        self.device, self.start, self.peak_bytes = device, 0, 0

    def __enter__(self) -> "Meter":
        self._sampler: _Sampler | None = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            give_back(self.device)
            self._sampler = None if _reset_high_water() else _Sampler()
        self.start = used_bytes(self.device)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _high_water() if self._sampler is None else self._sampler.stop()
        self.peak_bytes = max(peak - self.start, 0)


class _Sampler:
    """The highest resident memory since its making."""

    def __init__(self) -> None:
        self._peak, self._done = _resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._peak = max(self._peak, _resident())

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self._peak, _resident())


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
