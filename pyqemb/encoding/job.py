"""Resumable encoding of a file of texts to a file of vectors, in atomic parts, by one process, several, or tasks.

The parts are in the folder OUT.parts (`jobs/folder.py`): part p has the rows from p * rows_per_part on.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pyqemb.data.arguments import Count, NotNegative, checked
from pyqemb.data.files import atomic_file, check_writable, locked, one_at_a_time, remove_folder
from pyqemb.data.machine import writing
from pyqemb.data.rows import estimate_rows
from pyqemb.encoding.inputs import Row, read_texts
from pyqemb.encoding.inputs import parts as parts_of
from pyqemb.encoding.outputs import Part, ids_path, save_array, writer_of
from pyqemb.encoding.workers import Encoder, Settings
from pyqemb.errors import ConfigError, DataError
from pyqemb.jobs.executors import Processes, run
from pyqemb.jobs.folder import check_complete, claim, describe_output, parts_folder
from pyqemb.jobs.parts import DamagedPartError, VectorPart, texts_digest
from pyqemb.jobs.status import Reporter
from pyqemb.jobs.tasks import Task, task_of
from pyqemb.model.cached_encoder import settings_digest
from pyqemb.model.device import pick_device
from pyqemb.model.embedder import Embedder
from pyqemb.model.quantize import PRECISIONS, Precision, quantize, value_ranges
from pyqemb.model.source import named_dtype

Progress = Callable[[int, int], None]  # rows and bytes of text that have been encoded


@dataclass(frozen=True)
class Encoded:
    """The result of `encode_file`.

    Attributes:
        out: the file that was written. Of a task, the folder of the parts.
        rows: the number of rows of the file. Of a task, that of its own parts.
        dim: the dimension of a vector, 0 for a task without parts.
        resumed: the number of these rows that an earlier run had finished.
    """

    out: Path
    rows: int
    dim: int
    resumed: int


@checked
def encode_file(
    model: str | Path,
    path: str | Path,
    out: str | Path,
    *,
    side: Literal["query", "document", "raw"] = "document",
    instruction: str | None = None,
    field: str = "text",
    dim: Count | None = None,
    precision: Precision = "float32",
    max_length: Count | None = None,
    dtype: str | None = None,
    devices: Sequence[str] = ("auto",),
    rows_per_part: Count = 8192,
    tasks: Count | None = None,
    task: NotNegative | None = None,
    on_progress: Progress | None = None,
) -> Encoded:
    """Encode the texts of a file in order. A killed job continues after its last finished part.

    A finished part that is damaged is encoded again.

    Args:
        model: a model folder or hub id.
        path: a file of rows (.jsonl, .json, .csv, .tsv, .parquet) with a column `field`, or a .txt file with one text a
            line; it may be compressed.
        out: the file to write: .npy, .safetensors ("embeddings") or .parquet ("id", "embedding"). The ids of the first
            two formats go to OUT.ids.
        side: the prompt of the model that is put before each text: "query", "document" (default), or "raw" for none.
        instruction: the instruction of the query prompt (default: the model's own). Only for side "query".
        field: the column that holds the texts (default "text").
        dim: the Matryoshka dimension: vectors are truncated to it and normalized again (default: the model's own).
        precision: "float32" (default), "int8", "uint8", "binary" or "ubinary". The ranges of int8 and uint8 are those
            of all vectors of the file; they go to OUT.ranges.npy.
        max_length: texts are truncated to this many tokens (default: the model's own limit).
        dtype: the dtype of the model's weights and computation, e.g. "bfloat16" (default: as in
            `Embedder.from_pretrained`).
        devices: one process for each device, e.g. ("cuda:0", "cuda:1") or ("cpu", "cpu"). A single device is used in
            this process (default: the GPU if there is one, else the CPU).
        rows_per_part: the number of rows of a part, which a killed process can lose (default 8192).
        tasks: the number of tasks, processes on any machines that share the job and its folder OUT.parts (default: this
            call does the whole job). Each task is a call of its own, with the same arguments. When all have ended,
            `pyqemb.finish(out)` writes `out`.
        task: the number of this task, from 0. Task i encodes the parts i, i + tasks, i + 2 * tasks and so on.
        on_progress: called after each part with the number of rows and of bytes of text that this call has encoded
            (default: not called).

    Returns:
        The file, its number of rows, the dimension of a vector, and the number of rows finished by an earlier run. A
        task returns the folder of the parts and its own numbers.

    Raises:
        ConfigError: an argument is out of range, the parts beside `out` belong to another job, or another process is
            writing to `out`: one with the same task number, with another number of tasks, or without tasks.
        DataError: the input is invalid.
        MachineError: the disk is full, or another error of the machine. Finished parts are kept.
    """
    path, out = Path(path), Path(out)
    write = writer_of(out)
    own = task_of(tasks, task)
    if instruction is not None and side != "query":
        raise ConfigError("instruction: is for side 'query'")
    if not devices:
        raise ConfigError("devices must name at least one device")
    named_dtype(dtype)
    settings = Settings(str(model), side, instruction, dim, max_length, dtype, rows_per_part)
    folder = parts_folder(out)
    if own is None:
        check_writable(out)
    if own and not str(path.resolve()).isprintable():
        raise ConfigError(f"{path}: tasks need an input whose name can be printed")
    if next(read_texts(path, field), None) is None:
        raise DataError(f"{path}: holds no texts")
    shapes = Embedder.without_weights(model, max_length=max_length)  # before anything is written
    shapes.check_dim(dim)
    for device in devices:
        pick_device(device, shapes.config)
    with locked(folder, "encode", own and own.member()):
        with one_at_a_time(folder) if own else nullcontext():
            job = _claim(folder, settings, path, field, settings_digest(shapes), shared=own is not None)
            if own:
                check_writable(out)
                describe_output(folder, "encode", job, {"precision": precision})
        fill = partial(_fill, _Input(folder, job, path, field, rows_per_part), settings, devices, own, on_progress)
        files, rows, resumed = fill()
        if own:
            return Encoded(folder, rows, files[0].vectors().shape[1] if files else 0, resumed)
        if not rows:
            raise DataError(f"{path}: holds no texts")
        with writing(out):
            try:
                size = _assemble(files, rows, out, precision, write)
            except DamagedPartError:  # damaged after it was written or verified
                files, rows, _ = fill()
                size = _assemble(files, rows, out, precision, write)
            remove_folder(folder)
    return Encoded(out, rows, size, resumed)


def finish(out: Path, folder: Path, job: str, facts: dict[str, Any], settings: dict[str, Any]) -> Encoded:
    """Join the parts that tasks have made to the output, and remove their folder.

    Args:
        out: the file to write.
        folder: the folder of the parts, which is locked.
        job: the digest of the job.
        facts: the manifest of the job.
        settings: the settings of the output.

    Raises:
        DataError: parts are missing or damaged, or the input has changed. The parts are kept.
    """
    write, precision = writer_of(out), settings.get("precision")
    path, field, size = facts.get("input"), facts.get("field"), facts.get("rows_per_part")
    if not (isinstance(path, str) and isinstance(field, str) and precision in PRECISIONS) or not (
        isinstance(size, int) and not isinstance(size, bool) and size >= 1
    ):
        raise DataError(f"{folder}: its manifest is of another version of pyqemb, or damaged")
    source = Path(path)
    if not source.is_file():
        raise DataError(f"{source}: no such file; it is the input of {folder}")
    if {name: facts.get(name) for name in ("bytes", "modified")} != _state(source):
        raise DataError(f"{source}: has changed since its parts in {folder} were begun")
    files, rows = [], 0
    for part, own in _Input(folder, job, source, field, size).parts():
        files.append(part)
        rows += len(own)
    check_complete(folder, files)
    with writing(out):
        dim = _assemble(files, rows, out, precision, write)
        remove_folder(folder)
    return Encoded(out, rows, dim, rows)


@dataclass(frozen=True)
class _Input:
    """The texts of a job, and the folder of its parts."""

    folder: Path
    job: str
    path: Path
    field: str
    rows_per_part: int

    def parts(self, task: Task | None = None) -> Iterator[tuple[VectorPart, list[Row]]]:
        """Yield the parts of the job, or of a task, and their rows."""
        for number, rows in enumerate(parts_of(read_texts(self.path, self.field), self.rows_per_part)):
            if task is None or task.has(number):
                yield VectorPart(self.folder / f"{number:08}.npy", self.job, texts_digest(rows)), rows


def _fill(
    texts: _Input, settings: Settings, devices: Sequence[str], task: Task | None, on_progress: Progress | None
) -> tuple[list[VectorPart], int, int]:
    """Encode the missing or damaged parts, of a task its own; returns (parts, rows, rows that existed)."""
    rows = done = resumed = size = 0
    files: list[VectorPart] = []

    def missing() -> Iterator[tuple[VectorPart, list[Row]]]:
        nonlocal rows, done, resumed
        for target, own in texts.parts(task):
            files.append(target)
            rows += len(own)
            if target.is_whole():
                done, resumed = done + len(own), resumed + len(own)
            else:
                yield target, own

    def on_done(work: tuple[VectorPart, list[Row]]) -> None:
        nonlocal done, size
        done, size = done + len(work[1]), size + sum(len(row.text.encode("utf-8", "replace")) for row in work[1])
        report.advance()
        if on_progress is not None:
            on_progress(done, size)

    known = estimate_rows(texts.path)
    total = None if known is None else -(-known[0] // texts.rows_per_part)
    with Reporter(texts.folder, "encode", task) as report:
        report.stage("encode", "[0-9]*.npy", total, is_estimate=known is not None and not known[1])
        run(Processes(partial(Encoder, settings), devices), missing(), on_done)
    return files, rows, resumed


def _claim(folder: Path, settings: Settings, path: Path, field: str, model: str, *, shared: bool = False) -> str:
    """Start or continue the parts of this job; returns its digest. ConfigError if they belong to another job.

    `model`: a digest of the model's settings and tokenizer. `shared`: other tasks may work in the folder.
    """
    facts = {**asdict(settings), "weights": _digest(settings.model), "input": str(path.resolve()), "field": field}
    return claim(folder, {**facts, "settings of the model": model, **_state(path)}, shared=shared)


def _state(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"bytes": stat.st_size, "modified": stat.st_mtime_ns}


def _digest(model: str) -> str:
    """A digest of a folder's weight files by name, size and time; the name itself for a hub id."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([model, facts]).encode()).hexdigest()[:16]


def _assemble(files: Sequence[VectorPart], rows: int, out: Path, precision: str, write: Any) -> int:
    """Write the parts in order to one file; returns the dimension of a vector. On DamagedPartError it is incomplete."""
    ranges = None
    if precision in ("int8", "uint8"):
        found = np.stack([value_ranges(part.vectors()) for part in files])
        ranges = np.stack([found[:, 0].min(axis=0), found[:, 1].max(axis=0)])
    sample = quantize(files[0].vectors()[:1], precision, ranges)
    stream = (Part(quantize(part.vectors(), precision, ranges), part.ids()) for part in files)
    with atomic_file(out) as temporary:
        write(temporary, stream, rows, sample.shape[1], sample.dtype)
    beside = out.with_name(out.name + ".ranges.npy")
    for old in (ids_path(out), beside):  # files of an earlier output with that name
        with writing(old):
            old.unlink(missing_ok=True)
    if out.suffix != ".parquet" and files[0].ids():
        with atomic_file(ids_path(out)) as temporary, temporary.open("w", encoding="utf-8") as file:
            for part in files:
                file.writelines(f"{key}\n" for key in part.ids())
    if ranges is not None:
        save_array(beside, ranges)
    return sample.shape[1]
