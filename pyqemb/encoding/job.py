"""Resumable encoding of a file of texts to a file of vectors, in atomic parts, by one process or several.

OUT.parts/.lock             held while a process works at OUT
OUT.parts/manifest.json     sealed: what the parts are made of; another job refuses to go on from them
OUT.parts/00000000.*        part 0, see `parts.py`; one that is damaged is made again
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pyqemb.data.arguments import Count, checked
from pyqemb.data.files import atomic_file, check_writable, locked, remove_folder
from pyqemb.data.machine import unreadable, writing
from pyqemb.data.sealed import seal, unseal
from pyqemb.encoding.inputs import Row, parts, read_texts
from pyqemb.encoding.outputs import Part, ids_path, writer_of
from pyqemb.encoding.parts import DamagedPartError, PartFiles, texts_digest
from pyqemb.encoding.workers import Settings, Workers, save_array
from pyqemb.errors import ConfigError, DataError, MachineError
from pyqemb.model.cached_encoder import settings_digest
from pyqemb.model.device import pick_device
from pyqemb.model.embedder import Embedder
from pyqemb.model.quantize import Precision, quantize, value_ranges
from pyqemb.model.source import named_dtype

Progress = Callable[[int, int], None]  # rows and bytes of text that have been encoded


@dataclass(frozen=True)
class Encoded:
    """The result of `encode_file`: the file, its number of rows, and the dimension of a vector."""

    out: Path
    rows: int
    dim: int
    resumed: int  # rows that an earlier run had finished


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
        on_progress: called after each part with the number of rows and of bytes of text that this call has encoded
            (default: not called).

    Returns:
        The file, its number of rows, the dimension of a vector, and the number of rows finished by an earlier run.

    Raises:
        ConfigError: an argument is out of range, the parts beside `out` belong to another job, or another process is
            writing to `out`.
        DataError: the input is invalid.
        MachineError: the disk is full, or another error of the machine. Finished parts are kept.
    """
    path, out = Path(path), Path(out)
    write = writer_of(out)
    if instruction is not None and side != "query":
        raise ConfigError("instruction: is for side 'query'")
    if not devices:
        raise ConfigError("devices must name at least one device")
    named_dtype(dtype)
    settings = Settings(str(model), side, instruction, dim, max_length, dtype, rows_per_part)
    folder = out.with_name(out.name + ".parts")
    check_writable(out)
    if next(read_texts(path, field), None) is None:
        raise DataError(f"{path}: holds no texts")
    shapes = Embedder.without_weights(model, max_length=max_length)  # before anything is written
    shapes.check_dim(dim)
    for device in devices:
        pick_device(device, shapes.config)
    try:
        with locked(folder, "encode"):
            job = _claim(folder, settings, path, field, settings_digest(shapes))
            files, rows, resumed = _fill(folder, job, settings, path, field, devices, on_progress)
            if not rows:
                raise DataError(f"{path}: holds no texts")
            with writing(out):
                try:
                    size = _assemble(files, rows, out, precision, write)
                except DamagedPartError:  # damaged after it was written or verified
                    files, rows, _ = _fill(folder, job, settings, path, field, devices, on_progress)
                    size = _assemble(files, rows, out, precision, write)
                remove_folder(folder)
    except BrokenProcessPool as error:
        raise MachineError("a process died, perhaps out of memory; finished parts are kept") from error
    return Encoded(out, rows, size, resumed)


def _fill(
    folder: Path,
    job: str,
    settings: Settings,
    path: Path,
    field: str,
    devices: Sequence[str],
    on_progress: Progress | None,
) -> tuple[list[PartFiles], int, int]:
    """Encode the missing or damaged parts; returns (parts, rows, rows that existed)."""
    rows = done = resumed = size = 0
    files: list[PartFiles] = []
    running: dict[Future[None], list[Row]] = {}
    workers = Workers(settings, devices)

    def finish(some: set[Future[None]]) -> None:
        nonlocal done, size
        for future in some:
            own = running.pop(future)
            future.result()
            done, size = done + len(own), size + sum(len(row.text.encode("utf-8", "replace")) for row in own)
            if on_progress is not None:
                on_progress(done, size)

    with workers:
        for part in parts(read_texts(path, field), settings.rows_per_part):
            rows += len(part)
            target = PartFiles(folder / f"{len(files):08}.npy", job, texts_digest(part))
            files.append(target)
            if _is_whole(target):
                done, resumed = done + len(part), resumed + len(part)
                continue
            while len(running) >= 2 * len(devices):
                finish(wait(running, return_when=FIRST_COMPLETED).done)
            running[workers.submit(target, part)] = part
        while running:
            finish(wait(running, return_when=FIRST_COMPLETED).done)
    return files, rows, resumed


def _is_whole(part: PartFiles) -> bool:
    if not part.started():
        return False
    try:
        part.verify()
    except DamagedPartError as error:
        logging.getLogger("pyqemb").warning("%s; the part is encoded again", error)
        return False
    return True


def _claim(folder: Path, settings: Settings, path: Path, field: str, model: str) -> str:
    """Start or continue the parts of this job; returns its digest. ConfigError if they belong to another job.

    `model`: a digest of the model's settings and tokenizer.
    """
    stat = path.stat()
    facts = {**asdict(settings), "weights": _digest(settings.model), "input": str(path.resolve()), "field": field}
    facts = {name: _plain(value) if isinstance(value, str) else value for name, value in facts.items()}
    facts |= {"settings of the model": model, "bytes": stat.st_size, "modified": stat.st_mtime_ns}
    manifest, sealed = folder / "manifest.json", seal(facts)
    job = hashlib.sha256(sealed).hexdigest()
    if manifest.exists():
        try:
            before = unseal(manifest.read_bytes(), str(manifest))
        except OSError as error:
            raise unreadable(manifest, error) from error
        except DataError as error:
            raise DataError(f"{error}; remove {folder} to start over") from error
        changed = [name for name in facts if before.get(name) != facts[name]]
        if changed and any(folder.glob("*.npy")):
            raise ConfigError(
                f"{folder}: holds parts of another job ({changed[0]} was {before.get(changed[0])!r}, now "
                f"{facts[changed[0]]!r}); remove it to start over"
            )
        if not changed:
            return job
    with atomic_file(manifest) as temporary:
        temporary.write_bytes(sealed)
    return job


def _plain(text: str) -> str:
    """The text with escapes for the bytes of a file name that are not UTF-8, which JSON cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def _digest(model: str) -> str:
    """A digest of a folder's weight files by name, size and time; the name itself for a hub id."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([model, facts]).encode()).hexdigest()[:16]


def _assemble(files: Sequence[PartFiles], rows: int, out: Path, precision: str, write: Any) -> int:
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
