"""The workers of a job: this process, or one process for each device."""

import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pyqemb.data.files import atomic_file
from pyqemb.data.npy import npy
from pyqemb.encoding.inputs import Row
from pyqemb.encoding.parts import PartFiles
from pyqemb.errors import DataError, PyqembError
from pyqemb.model.embedder import Embedder


@dataclass(frozen=True)
class Settings:
    """The settings that the vectors depend on."""

    model: str
    side: Literal["query", "document", "raw"] = "document"
    instruction: str | None = None
    dim: int | None = None
    max_length: int | None = None
    dtype: str | None = None
    rows_per_part: int = 8192


class Workers:
    """A process for each device, or this one."""

    def __init__(self, settings: Settings, devices: Sequence[str]):
        self.settings, self.devices = settings, devices
        self.pool: ProcessPoolExecutor | None = None
        self.model: Embedder | None = None

    def __enter__(self) -> "Workers":
        if len(self.devices) > 1:
            context = get_context("spawn")
            queue = context.Queue()
            for device in self.devices:
                queue.put(device)
            self.pool = ProcessPoolExecutor(
                len(self.devices), context, _start, (self.settings, queue, len(self.devices))
            )
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

    def submit(self, target: PartFiles, part: list[Row]) -> "Future[None]":
        """Encode the rows of a part into its files, on the next free device; the future has no result."""
        if self.pool is not None:
            return self.pool.submit(_encode_part, target, part)
        if self.model is None:
            self.model = _open(self.settings, self.devices[0])
        _write_part(self.model, self.settings, target, part)
        future: Future[None] = Future()
        future.set_result(None)
        return future


_here: dict[str, Any] = {}  # the model and the settings of a worker process


def _ready() -> None:
    pass


def _start(settings: Settings, queue: Any, processes: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    device = queue.get()
    if device == "cpu":
        torch.set_num_threads(max((os.cpu_count() or 1) // processes, 1))
    _here["settings"] = settings
    try:
        _here["model"] = _open(settings, device)
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


def _encode_part(target: PartFiles, part: list[Row]) -> None:
    if "error" in _here:
        raise _here["error"]
    try:
        _write_part(_here["model"], _here["settings"], target, part)
    except SystemExit as stop:  # the pool would continue with the next part
        os._exit(stop.code if isinstance(stop.code, int) else 1)


def _open(settings: Settings, device: str) -> Embedder:
    return Embedder.from_pretrained(settings.model, max_length=settings.max_length, dtype=settings.dtype, device=device)


def _write_part(model: Embedder, settings: Settings, target: PartFiles, part: list[Row]) -> None:
    texts = [row.text for row in part]
    if settings.side == "query":
        vectors = model.encode_query(texts, instruction=settings.instruction, dim=settings.dim)
    elif settings.side == "document":
        vectors = model.encode_document(texts, dim=settings.dim)
    else:
        vectors = model.encode(texts, dim=settings.dim)
    if not np.isfinite(vectors).all():
        raise DataError(f"the model gives NaN or infinity for a text of part {target.path.stem}")
    target.write(vectors, None if part[0].id is None else [str(row.id) for row in part])
    save_array(target.path, vectors)  # last: a part whose vectors exist is complete


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy file, completely or not at all."""
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        for content in npy(array):
            file.write(content)  # np.save does not report why a write fails
