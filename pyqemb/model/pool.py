"""A pool of worker processes that each hold the model, under the names of sentence-transformers."""

import os
import queue
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.multiprocessing import get_context

from pyqemb.data.arguments import checked
from pyqemb.errors import ConfigError
from pyqemb.model.device import gpu_is_usable, named_device

Pool = dict[str, Any]  # "input" and "output" queues, "processes"
_LONGEST_CHUNK = 5000


class Pooled:
    """sentence-transformers' multi-process API for Embedder and Reranker."""

    @checked
    def start_multi_process_pool(self, target_devices: Sequence[str] | None = None) -> Pool:
        """Start one worker process for each device.

        The model itself moves to the CPU, where the workers share its memory. A script that calls this needs
        `if __name__ == "__main__":`.

        Args:
            target_devices: the devices (default: all GPUs, or four processes on the CPU).

        Returns:
            The worker processes. Pass them as `pool=`, and to `stop_multi_process_pool` at the end.

        Raises:
            ConfigError: there is no device.
        """
        if target_devices is None:
            count = torch.cuda.device_count() if gpu_is_usable() else 0
            target_devices = [f"cuda:{index}" for index in range(count)] or ["cpu"] * 4
        if not target_devices:
            raise ConfigError("target_devices must name at least one device")
        for device in target_devices:
            named_device(device, "target_devices")
        self.to("cpu").share_memory()  # type: ignore[attr-defined]
        context = get_context("spawn")
        tasks, results = context.Queue(), context.Queue()
        threads = max((os.cpu_count() or 1) // len(target_devices), 1)
        processes = [
            context.Process(target=_work, args=(str(device), threads, self, tasks, results), daemon=True)
            for device in target_devices
        ]
        for process in processes:
            process.start()
        return {"input": tasks, "output": results, "processes": processes}

    @staticmethod
    @checked
    def stop_multi_process_pool(pool: Pool) -> None:
        """Stop the processes of `start_multi_process_pool`.

        Args:
            pool: the result of `start_multi_process_pool`.
        """
        _check_pool(pool)
        for process in pool["processes"]:
            process.terminate()
        for process in pool["processes"]:
            process.join()
            process.close()
        pool["input"].cancel_join_thread()
        pool["input"].close()
        pool["output"].close()

    def in_processes(
        self,
        method: str,
        items: Sequence[Any],
        options: dict[str, Any],
        devices: Sequence[str] | None,
        pool: Pool | None,
        chunk_size: int | None,
        on_done: Callable[[int], None],
    ) -> list[Any]:
        """The results of `method` for chunks of the items, in order, computed by `pool` or by a temporary pool."""
        if chunk_size is not None and chunk_size < 1:
            raise ConfigError(f"chunk_size must be at least 1, got {chunk_size}")
        if pool is not None:
            _check_pool(pool)
        if not items:
            return []
        own = self.start_multi_process_pool(devices) if pool is None else None
        try:
            return _run(pool or own or {}, method, items, options, chunk_size, on_done)
        finally:
            if own is not None:
                self.stop_multi_process_pool(own)


def _check_pool(pool: Pool) -> None:
    if not {"input", "output", "processes"} <= pool.keys():
        raise ConfigError(f"pool must be the result of start_multi_process_pool, got a dict with {list(pool)!r:.100}")


def _run(
    pool: Pool,
    method: str,
    items: Sequence[Any],
    options: dict[str, Any],
    chunk_size: int | None,
    on_done: Callable[[int], None],
) -> list[Any]:
    size = chunk_size or min(-(-len(items) // (10 * len(pool["processes"]))), _LONGEST_CHUNK)
    chunks = [items[first : first + size] for first in range(0, len(items), size)]
    call = uuid.uuid4().hex  # results of an interrupted call may still arrive
    for number, chunk in enumerate(chunks):
        pool["input"].put((call, number, method, chunk, options))
    results, failures = [None] * len(chunks), []
    missing = len(chunks)
    while missing:
        theirs, number, result, failure = _next(pool)
        if theirs == call:
            results[number], missing = result, missing - 1
            failures += [failure] if failure else []
            on_done(len(chunks[number]))
    if failures:
        raise RuntimeError(f"a worker process failed: {failures[0]}")
    return results


def _next(pool: Pool) -> Any:
    while True:
        try:
            return pool["output"].get(timeout=1.0)
        except queue.Empty:
            dead = [f"{p.pid} (exit code {p.exitcode})" for p in pool["processes"] if not p.is_alive()]
            if dead:
                raise RuntimeError(f"worker processes died: {', '.join(dead)}; start a new pool") from None


def _work(device: str, threads: int, model: torch.nn.Module, tasks: Any, results: Any) -> None:
    if device == "cpu":
        torch.set_num_threads(threads)
    moved = False
    while True:
        call, number, method, chunk, options = tasks.get()
        try:
            if not moved:
                model, moved = model.to(device), True
            result, failure = _arrays(getattr(model, method)(chunk, **options)), None
        except Exception as error:
            result, failure = None, f"{type(error).__name__}: {error}"
        results.put((call, number, result, failure))


def _arrays(value: Any) -> Any:
    """Convert tensors to numpy arrays, which need no file descriptors to be sent between processes."""
    if isinstance(value, torch.Tensor):
        value = value.float() if value.dtype == torch.bfloat16 else value
        return value.cpu().numpy()
    if isinstance(value, dict):
        return {name: _arrays(item) for name, item in value.items()}
    return [_arrays(item) for item in value] if isinstance(value, list) else value


def as_tensors(values: list[Any]) -> list[Any]:
    """The same list with tensors instead of numpy arrays, at every level."""
    return [_tensors(value) for value in values]


def _tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {name: _tensors(item) for name, item in value.items()}
    return as_tensors(value) if isinstance(value, list) else value
