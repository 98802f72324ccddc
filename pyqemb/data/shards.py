"""Training data larger than memory: examples in memory-mapped Arrow files, by task, with a manifest.

FOLDER/manifest.json        sealed (`data/sealed.py`): of each file its size, of each record batch its place, rows and
                            checksum
FOLDER/00000-00000.arrow    task 0, file 0: Arrow IPC, record batches of at most 1024 rows

The checksum of a record batch is verified before Arrow reads it.
"""

import hashlib
import json
import os
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import pyarrow as pa

from pyqemb.data.columns import Columns
from pyqemb.data.files import atomic_folder
from pyqemb.data.layouts import Example
from pyqemb.data.machine import reason, unreadable, unwritable
from pyqemb.data.sealed import seal, unseal
from pyqemb.data.splits import dataset_files
from pyqemb.data.strict_json import parse
from pyqemb.errors import DataError, MachineError

FORMAT = "pyqemb-shards-2"
_BATCH = 1024  # rows of a record batch, the unit of random access
_MAX_ROWS = 1 << 20  # of a record batch of any version
_SUMMARY_COUNTS = "rows", "negatives", "most_negatives", "score", "scores", "query_embedding"
_OPEN = 4096  # record batches whose columns are cached
_NUMBERS = pa.list_(pa.float64())
_SCHEMA = pa.schema(
    [
        ("query", pa.string()), ("positive", pa.string()), ("negatives", pa.list_(pa.string())),
        ("instruction", pa.string()), ("task", pa.string()),
        ("score", pa.float64()), ("scores", _NUMBERS), ("query_embedding", _NUMBERS), ("positive_embedding", _NUMBERS),
    ]
)  # fmt: skip


@dataclass
class Summary:
    """Facts about the rows of a task for checks that do not read them; counts are rows that have the column."""

    task: str | None
    rows: int = 0
    digest: str = ""
    instructions: list[str | None] = field(default_factory=list)  # at most two; only whether there are several matters
    negatives: int = 0
    most_negatives: int = 0
    score: int = 0
    scores: int = 0
    query_embedding: int = 0
    files: list[dict[str, Any]] = field(
        default_factory=list
    )  # "size" and "batches": [rows, offset, size, crc32] of each


class Shards(Sequence[Example]):
    """The examples of one task of a folder, in the order in which they were written; read on access.

    `instruction` is the default for rows without one. Raises DataError if a file is missing or damaged, at the latest
    when a damaged row is read.
    """

    def __init__(self, folder: Path, number: int, summary: Summary, instruction: str | None = None):
        self.summary, self.instruction = summary, instruction
        self._files = [_File(folder / _name(number, file), facts) for file, facts in enumerate(summary.files)]
        self._batches = [(file, batch) for file in self._files for batch in range(len(file.batches))]
        self._ends = list(accumulate(rows for file in self._files for rows, *_ in file.batches))
        self._open: dict[int, list[Any]] = {}  # cached columns of record batches, memory-mapped

    def __len__(self) -> int:
        return self.summary.rows

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = bisect_right(self._ends, index)
        first = self._ends[at - 1] if at else 0
        if at not in self._open:
            if len(self._open) == _OPEN:
                self._open.clear()
            self._open[at] = self._columns(at)
        return self._example(self._open[at], index - first)

    def __iter__(self) -> Iterator[Example]:
        for at, (start, end) in enumerate(zip([0, *self._ends], self._ends, strict=False)):
            columns = self._columns(at)
            for i in range(end - start):
                yield self._example(columns, i)

    def with_instruction(self, instruction: str | None) -> "Shards":
        """The same rows, with this instruction for rows without one."""
        other = object.__new__(Shards)
        other.__dict__.update({**self.__dict__, "instruction": instruction})
        return other

    @property
    def digest(self) -> str:
        """The digest of all rows in order, and of the default instruction."""
        return f"{self.summary.digest} {self.instruction}" if self.instruction is not None else self.summary.digest

    @property
    def instructions(self) -> set[str | None]:
        """The instructions that the rows have, after `with_instruction`; None for a row without one."""
        return {self.instruction if own is None else own for own in self.summary.instructions}

    def _columns(self, at: int) -> list[Any]:
        """The columns of a record batch: arrays, or the value of every row if a column is empty."""
        file, batch = self._batches[at]
        columns: list[Any] = []
        for column in file.read(batch).columns:
            if column.null_count == len(column):
                columns.append(None)
            elif pa.types.is_list(column.type) and not column.null_count and not len(column.flatten()):
                columns.append(())
            else:
                columns.append(column)
        return columns

    def _example(self, columns: list[Any], i: int) -> Example:
        values: Any = [column[i].as_py() if isinstance(column, pa.Array) else column for column in columns]
        plain: Any = [tuple(value) if isinstance(value, list) else value for value in values]
        example = Example(*plain)
        if example.instruction is None and self.instruction is not None:
            return replace(example, instruction=self.instruction)
        return example


class _File:
    """A memory-mapped Arrow file.

    Only the record batches are read with Arrow, each checked before its first use.
    """

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path, self.batches = path, facts["batches"]
        self._checked = bytearray(len(self.batches))
        try:
            self._bytes = pa.memory_map(str(path)).read_buffer()
        except FileNotFoundError as error:
            raise DataError(f"{path}: not a readable shard: it is missing") from error
        except OSError as error:
            raise unreadable(path, error, MachineError) from error
        if self._bytes.size != facts["size"]:
            raise DataError(
                f"{path}: not a readable shard: it has {self._bytes.size} bytes, the manifest says {facts['size']}"
            )

    def read(self, batch: int) -> pa.RecordBatch:
        rows, offset, size, crc = self.batches[batch]
        if not self._checked[batch]:
            try:
                with self.path.open("rb") as file:  # not memory-mapped, because a bad sector would kill the process
                    file.seek(offset)
                    digest = zlib.crc32(file.read(size))
            except OSError as error:
                raise unreadable(self.path, error, MachineError) from error
            if digest != crc:
                raise DataError(
                    f"{self.path}: not a readable shard: damaged between bytes {offset} and {offset + size}; "
                    "remove the folder and write it again"
                )
        try:
            found = pa.ipc.read_record_batch(self._bytes.slice(offset, size), _SCHEMA)
            if not self._checked[batch]:
                found.validate(full=True)  # reading an invalid array, e.g. with a negative offset, ends the process
        except (pa.ArrowException, OSError, EOFError, ValueError) as error:
            raise DataError(
                f"{self.path}: not a readable shard: the record batch at byte {offset} is not valid: {reason(error)}"
            ) from error
        if found.num_rows != rows:
            raise DataError(
                f"{self.path}: not a readable shard: the record batch at byte {offset} has {found.num_rows} rows, the "
                f"manifest says {rows}"
            )
        self._checked[batch] = True
        return found


def is_shards(folder: Path) -> bool:
    """Whether `write_shards` wrote a folder."""
    return (folder / "manifest.json").is_file() and any(folder.glob("*.arrow"))


def read_shards(folder: str | Path) -> dict[str | None, Shards]:
    """The tasks of a folder and their examples."""
    folder = Path(folder)
    path = folder / "manifest.json"
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: not a folder of shards: the manifest is missing") from error
    except OSError as error:
        raise unreadable(path, error, MachineError) from error
    manifest = parse(raw, str(path))
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise DataError(f"{folder}: has format {found!r}, this version reads {FORMAT!r}; write it again")
    tasks = unseal(raw, str(path)).get("tasks")
    if not isinstance(tasks, list) or not all(map(_is_summary, tasks)):
        raise DataError(f"{path}: not the manifest of a folder of shards: its tasks have other fields or values")
    summaries = [Summary(**values) for values in tasks]
    if len({summary.task for summary in summaries}) < len(summaries):
        raise DataError(f"{path}: not the manifest of a folder of shards: it has a task twice")
    return {summary.task: Shards(folder, number, summary) for number, summary in enumerate(summaries)}


def _is_summary(values: Any) -> bool:
    """Whether a value is a `Summary` as `write_shards` writes it, and agrees with itself."""
    if not isinstance(values, dict) or values.keys() != Summary.__dataclass_fields__.keys():
        return False
    counts = [values[name] for name in _SUMMARY_COUNTS]
    texts, files = values["instructions"], values["files"]
    if not (
        all(map(_is_count, counts))
        and (values["task"] is None or isinstance(values["task"], str))
        and isinstance(values["digest"], str)
        and isinstance(texts, list)
        and all(text is None or isinstance(text, str) for text in texts)
        and isinstance(files, list)
    ):
        return False
    batches = []
    for file in files:
        if not isinstance(file, dict) or file.keys() != {"size", "batches"} or not _is_count(file["size"]):
            return False
        for batch in file["batches"] if isinstance(file["batches"], list) else [None]:
            if not isinstance(batch, list) or len(batch) != 4 or not all(map(_is_count, batch)):
                return False
            rows, offset, size, _ = batch
            if not 0 < rows <= _MAX_ROWS or offset + size > file["size"]:
                return False
            batches.append(batch)
    return sum(batch[0] for batch in batches) == values["rows"]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def write_shards(folder: str | Path, examples: Iterable[Example], *, rows_per_file: int = 1_000_000) -> int:
    """Write examples as a folder of shards, completely or not at all, with constant memory. Returns their number.

    Raises DataError: no examples. MachineError: the disk is full.
    """
    folder = Path(folder)
    try:
        with atomic_folder(folder) as temporary, ExitStack() as open_files:
            writers: dict[str | None, _Writer] = {}
            for example in examples:
                if example.task not in writers:
                    writers[example.task] = _Writer(temporary, len(writers), example.task, rows_per_file, open_files)
                writers[example.task].add(example)
            if not writers:
                raise DataError(f"{folder}: no examples to write")
            summaries = [writer.finish() for writer in writers.values()]
            manifest = {
                "format": FORMAT,
                "rows": sum(s.rows for s in summaries),
                "tasks": [s.__dict__ for s in summaries],
            }
            (temporary / "manifest.json").write_bytes(seal(manifest))
    except pa.ArrowException as error:
        raise DataError(f"{folder}: cannot be written: {error}") from error
    except OSError as error:
        raise unwritable(folder, error) from error
    return sum(s.rows for s in summaries)


def shards_of_parquet(
    folder: Path, examples: Iterable[Example], split: str | None = None, columns: Columns | None = None
) -> Path:
    """Return a folder of shards made from the Parquet files of a split, whose rows are read with `columns`.

    It is written at the first use and whenever the files have changed.

    It is in the user's cache, $XDG_CACHE_HOME/pyqemb or ~/.cache/pyqemb; the data folder is only read.
    """
    files = [(str(path), path.stat()) for path in dataset_files(folder, split)]
    facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    digest = hashlib.sha256(json.dumps([FORMAT, facts]).encode()).hexdigest()[:16]
    chosen = [str(folder.resolve()), split, *([dict(columns)] if columns else [])]
    source = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:16]
    home = cache_folder() / "shards"
    target = home / f"{source}-{digest}"
    if not is_shards(target):
        for old in home.glob(f"{source}-*"):
            shutil.rmtree(old, ignore_errors=True)
        write_shards(target, examples)
    return target


def cache_folder() -> Path:
    """The folder of pyqemb for cached files."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if Path(given).is_absolute() else Path.home() / ".cache") / "pyqemb"


class _Writer:
    """The files of one task."""

    def __init__(self, folder: Path, number: int, task: str | None, rows_per_file: int, files: ExitStack):
        self._folder, self._number, self._rows_per_file, self._files = folder, number, rows_per_file, files
        self._summary, self._hash = Summary(task), hashlib.sha256()
        self._waiting: list[Example] = []
        self._writer: Any = None
        self._sink: Any = None
        self._file = ExitStack()

    def add(self, example: Example) -> None:
        summary = self._summary
        summary.rows += 1
        self._hash.update(repr(astuple(example)).encode("utf-8", "surrogatepass"))
        if example.instruction not in summary.instructions and len(summary.instructions) < 2:
            summary.instructions.append(example.instruction)
        summary.negatives += bool(example.negatives)
        summary.most_negatives = max(summary.most_negatives, len(example.negatives))
        summary.score += example.score is not None
        summary.scores += bool(example.scores)
        summary.query_embedding += bool(example.query_embedding)
        self._waiting.append(example)
        if len(self._waiting) == _BATCH:
            self._flush()

    def finish(self) -> Summary:
        self._flush()
        self._close()
        self._summary.digest = self._hash.hexdigest()
        return self._summary

    def _flush(self) -> None:
        if not self._waiting:
            return
        if self._writer is None:
            path = self._folder / _name(self._number, len(self._summary.files))
            self._file = self._files.enter_context(ExitStack())
            self._sink = self._file.enter_context(pa.OSFile(str(path), "wb"))
            self._writer = pa.ipc.new_file(self._sink, _SCHEMA)
            self._summary.files.append({"size": 0, "batches": []})
        columns = zip(*([getattr(e, name) for name in _SCHEMA.names] for e in self._waiting), strict=True)
        arrays = [pa.array(list(column), type=kind) for column, kind in zip(columns, _SCHEMA.types, strict=True)]
        batch = pa.record_batch(arrays, schema=_SCHEMA)
        self._writer.write_batch(batch)
        message = batch.serialize()  # the bytes that the writer appended to the file
        file = self._summary.files[-1]
        file["batches"].append([batch.num_rows, self._sink.tell() - message.size, message.size, zlib.crc32(message)])
        self._waiting = []
        if sum(rows for rows, *_ in file["batches"]) >= self._rows_per_file:
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._summary.files[-1]["size"] = self._sink.tell()
            self._file.close()
            self._writer = None


def _name(task: int, file: int) -> str:
    return f"{task:05d}-{file:05d}.arrow"
