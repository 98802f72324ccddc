"""Executors run pieces of work, each of which makes one part: in this process, or in a process for each device.

`run` is the loop around them. Another engine needs a class with the methods of `Executor`.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, Protocol, TypeVar

from pyqemb.errors import MachineError, PyqembError

Worker = Callable[..., None]  # makes the part that its arguments describe
OpenWorker = Callable[[str], Worker]  # (device) -> the worker, e.g. with a model; pickled for other processes
W = TypeVar("W", bound=tuple[Any, ...])


class Executor(Protocol):
    """A context in which pieces of work run.

    Attributes:
        size: the number of pieces that run at the same time.
    """

    size: int

    def __enter__(self) -> "Executor": ...

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None: ...

    def submit(self, *work: Any) -> "Future[None]":
        """Call a worker with these arguments; the future has no result, or the error of the worker."""
        ...


def run(executor: Executor, work: Iterable[W], on_done: Callable[[W], None]) -> None:
    """Run all pieces of work, at most two for each worker of the executor at a time, and call `on_done` after each.

    Raises:
        MachineError: a process died. The errors of workers, the first one.
    """
    running: dict[Future[None], W] = {}

    def finish() -> None:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            own = running.pop(future)
            future.result()
            on_done(own)

    try:
        with executor:
            for each in work:
                while len(running) >= 2 * executor.size:
                    finish()
                running[executor.submit(*each)] = each
            while running:
                finish()
    except BrokenProcessPool as error:
        raise MachineError("a process died, perhaps out of memory; finished parts are kept") from error


class Processes:
    """A process for each device; with a single device, this process.

    Args:
        open_worker: opens the worker of a device, in its process and before its first piece of work.
        devices: the devices, e.g. ("cuda:0", "cuda:1").
    """

    def __init__(self, open_worker: OpenWorker, devices: Sequence[str]):
        self.open_worker, self.devices, self.size = open_worker, devices, len(devices)
        self.pool: ProcessPoolExecutor | None = None
        self.worker: Worker | None = None

    def __enter__(self) -> "Processes":
        if self.size > 1:
            context = get_context("spawn")
            queue = context.Queue()
            for device in self.devices:
                queue.put(device)
            self.pool = ProcessPoolExecutor(self.size, context, _start, (self.open_worker, queue, self.size))
            # Ctrl-C is sent to the whole process group; the workers inherit a mask, so that only this process handles
            # it.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self.pool.submit(_ready)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self.pool is None:
            return
        if kind is not None:  # the running parts are not needed
            for process in list((self.pool._processes or {}).values()):
                process.terminate()
        self.pool.shutdown(cancel_futures=True)

    def submit(self, *work: Any) -> "Future[None]":
        """Call the worker of the next free device; the future has no result."""
        if self.pool is not None:
            return self.pool.submit(_work, *work)
        if self.worker is None:
            self.worker = self.open_worker(self.devices[0])
        self.worker(*work)
        future: Future[None] = Future()
        future.set_result(None)
        return future


def threads_each(processes: int) -> int:
    """The number of threads of each of several processes that share the CPUs of this machine."""
    return max((os.cpu_count() or 1) // processes, 1)


_here: dict[str, Any] = {}  # the worker of this process, or the error of opening it


def _ready() -> None:
    pass


def _start(open_worker: OpenWorker, queue: Any, processes: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    device = queue.get()
    if device == "cpu":
        import torch

        torch.set_num_threads(threads_each(processes))
    try:
        _here["worker"] = open_worker(device)
    except PyqembError as error:  # an error here would only be reported as a broken pool
        _here["error"] = error
    signal.signal(signal.SIGTERM, _stop)  # last: an exception here would be printed


def _stop(number: int, _: Any) -> None:
    raise SystemExit(128 + number)  # temporary files are removed on exit


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(*work: Any) -> None:
    if "error" in _here:
        raise _here["error"]
    try:
        _here["worker"](*work)
    except SystemExit as stop:  # the pool would continue with the next part
        os._exit(stop.code if isinstance(stop.code, int) else 1)
