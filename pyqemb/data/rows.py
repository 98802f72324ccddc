r"""Rows of JSONL, JSON, CSV, TSV and Parquet files, and lines of text files, each with its place for error messages.

The last suffix may be a compression (.gz, .bz2, .xz, .zst), the one before it is the format: no suffix is JSONL, an
unknown one is an error. Text is UTF-8; a byte-order mark is skipped. Lines end with "\n" or "\r\n" only.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pyqemb.data import strict_json
from pyqemb.data.machine import raise_if_machine, reason, unreadable
from pyqemb.errors import ConfigError, DataError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")  # formats of rows
MAX_LINE = 64 << 20  # bytes of a line, of a CSV cell, of an object in a JSON array
_READ = 1 << 20
_SPACES = re.compile(r"[ \t\r\n]*")
_DAMAGED = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)
_OTHER_ENCODINGS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # before UTF-16, whose mark is a prefix of this one
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
_DELIMITERS = {".csv": (",", "commas"), ".tsv": ("\t", "tabs")}

Row = dict[str, Any]


def format_of(path: str | Path) -> str:
    """The suffix of the format, without a compression: ".jsonl" for "rows.jsonl.gz"."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_rows(path: str | Path) -> Iterator[tuple[str, Row]]:
    r"""Yield (place, row) of a file of rows; the place is "file:line", of Parquet and JSON arrays "file:row", from 1.

    The cells of CSV and TSV are text under the names of the header; an empty cell is None.

    Raises:
        DataError: an unknown suffix, or an invalid row, with its place.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("rows.csv").write_text("query,positive\nq,p\n")
        >>> list(read_rows("rows.csv"))
        [('rows.csv:2', {'query': 'q', 'positive': 'p'})]
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
        ".jsonl": read_lines, "": read_lines, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv,
        ".parquet": _read_parquet,
    }  # fmt: skip
    reader = readers.get(format_of(path))
    if reader is None:
        raise DataError(f"{path}: unknown format; expected {describe_formats()}")
    for number, row in reader(path):
        yield f"{path}:{number}", row


def estimate_rows(path: Path) -> tuple[int, bool] | None:
    """The number of rows of a file, and whether it is exact; None if it is not known without reading the whole file.

    Lines are counted in the first mebibyte of a file that is not compressed; they need not be rows.
    """
    kind = format_of(path)
    if path.suffix.lower() in COMPRESSIONS or kind == ".json":
        return None
    if kind == ".parquet":
        import pyarrow.parquet as pq

        with path.open("rb") as file:
            return pq.ParquetFile(file).metadata.num_rows, True
    with path.open("rb") as file:
        start = file.read(_READ)
    lines, size = start.count(b"\n"), path.stat().st_size
    if len(start) == size:
        return lines + (not start.endswith(b"\n")) - (kind in (".csv", ".tsv")), kind == ".txt"
    return (round(size * lines / (start.rfind(b"\n") + 1)), False) if lines else None


def check_is_file(path: Path) -> None:
    """DataError for a path that is no regular file: it may be read more than once, which a pipe does not allow."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is a pipe or a device" if path.exists() else "no such file"
        raise DataError(f"{path}: {found}{'; expected a file' if path.exists() else ''}")


def describe_formats(*more: str) -> str:
    """The suffixes of `read_rows`, and `more`, for an error."""
    return f"{', '.join((*FORMATS, *more))} (also with {', '.join(COMPRESSIONS)})"


@contextmanager
def open_bytes(path: str | Path) -> Iterator[IO[bytes]]:
    """Open for reading, decompressing by the last suffix. Damage met inside the block becomes a DataError."""
    path = Path(path)
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
    opener = openers.get(path.suffix.lower(), open)
    try:
        with opener(path, "rb") as file:
            yield file
    except _DAMAGED as error:
        raise DataError(f"{path}: damaged or cut short: {error}") from error
    except OSError as error:
        if error.errno is None:  # raised by the decompressors, not an error of the machine
            raise DataError(f"{path}: damaged or cut short: {error}") from error
        raise unreadable(path, error) from error


def read_text(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) of a UTF-8 file, plain or compressed."""
    for number, line in _lines(Path(path)):
        yield number, line.rstrip("\r\n")


def read_lines(path: str | Path) -> Iterator[tuple[int, Row]]:
    """Yield (line number from 1, object) of a JSONL file, plain or compressed. Blank lines are skipped."""
    for number, line in read_text(path):
        if line.strip():
            yield number, _object(line, f"{path}:{number}")


def _object(text: str, where: str) -> Row:
    try:
        row = strict_json.parse(text, where)
    except strict_json.JsonError as error:
        raise DataError(f"{where}:{error.column}: {error.problem}") from error
    if not isinstance(row, dict):
        raise DataError(f'{where}:1: expected an object like {{"query": ...}}, got {kind_of(row)}')
    return row


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line with its end) with bounded memory."""
    with open_bytes(path) as file:
        number = 0
        while raw := file.readline(MAX_LINE + 1):
            number += 1
            if len(raw) > MAX_LINE:
                raise DataError(f"{path}:{number}: the line is longer than {MAX_LINE >> 20} MiB")
            if number == 1:
                raw = _without_mark(raw, path)
            try:
                yield number, raw.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}:{error.start + 1}: not UTF-8: {error.reason}") from error


def _without_mark(start: bytes, path: Path) -> bytes:
    for name, marks in _OTHER_ENCODINGS.items():
        if start.startswith(marks):
            raise DataError(f"{path}:1:1: not UTF-8: the byte-order mark is that of {name}; save the file as UTF-8")
    return start.removeprefix(codecs.BOM_UTF8)


def _read_json(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the objects of an array, or of lines."""
    with open_bytes(path) as file:
        start = file.read(3).removeprefix(codecs.BOM_UTF8).lstrip()
        while not start and (more := file.read(_READ)):
            start = more.lstrip()
    if start.startswith(b"["):
        yield from _read_array(path)
        return
    for number, line in read_text(path):
        if line.strip():
            if start.startswith(b"{") and not line.rstrip().endswith("}"):
                raise DataError(
                    f"{path}:{number}: the object does not end on its line; expected an array of objects, [...], or "
                    "one object a line"
                )
            yield number, _object(line, f"{path}:{number}")


def _read_array(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the objects of an array one by one, with the memory of the largest."""
    # Only finds the end of an object; strict_json parses it.
    scanner = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=len)
    with open_bytes(path) as file:
        text = _Chunks(path, file)
        text.skip("[")
        number = 0
        while text.peek() != "]":
            number += 1
            where = f"{path}:{number}"
            if number > 1:
                text.skip(",")
            if text.peek() != "{":
                raise DataError(f'{where}: not JSON: expected an object like {{"query": ...}} in the array')
            while True:
                try:
                    _, end = scanner.raw_decode(text.buffer, text.at)
                    too_long = end - text.at > MAX_LINE
                    break
                except RecursionError as error:
                    raise DataError(f"{where}: nested too deeply") from error
                except json.JSONDecodeError as error:
                    if too_long := len(text.buffer) - text.at > MAX_LINE:
                        break
                    if not text.more():
                        raise DataError(f"{where}: not JSON: {error.msg}") from error
            if too_long:
                raise DataError(f"{where}: the object is longer than {MAX_LINE >> 20} MiB")
            yield number, _object(text.take(end), where)
        text.skip("]")
        if text.peek():
            raise DataError(f"{path}: not JSON: text after the end of the array")


class _Chunks:
    """A UTF-8 file as a text buffer that `more` extends; the text before `at` has been consumed."""

    def __init__(self, path: Path, file: IO[bytes]):
        self._path, self._file, self._first = path, file, True
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.buffer, self.at = "", 0

    def more(self) -> bool:
        self.buffer, self.at = self.buffer[self.at :], 0
        raw = self._file.read(max(_READ, len(self.buffer)))
        if self._first:
            raw, self._first = _without_mark(raw, self._path), False
        try:
            self.buffer += self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}: not UTF-8: {error.reason}") from error
        return bool(raw)

    def peek(self) -> str:
        """The next character that is not a space, "" at the end of the file."""
        while True:
            self.at = _SPACES.match(self.buffer, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.buffer) or not self.more():
                return self.buffer[self.at : self.at + 1]

    def skip(self, character: str) -> None:
        if (found := self.peek()) != character:
            raise DataError(f"{self._path}: not JSON: expected {character!r}, found {found or 'the end'!r}")
        self.at += 1

    def take(self, end: int) -> str:
        start, self.at = self.at, end
        return self.buffer[start:end]


def _read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    delimiter, words = _DELIMITERS[format_of(path)]
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if not cells:
                continue
            if header is None:
                # pandas writes its index without a name.
                header = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, start=1)]
                if len(set(header)) < len(header):
                    raise DataError(f"{where}: the header names a column twice: {header}")
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{where}: {len(cells)} cells where the header {header} names {len(header)}; "
                    f"expected {words} between cells and quotes around a cell that holds one{other_delimiter(header)}"
                )
            yield reader.line_num, {name: cell if cell else None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not {format_of(path)[1:].upper()}: {error}") from error


def other_delimiter(header: Iterable[str]) -> str:
    """A hint for the end of an error, if the only column of a header looks like several."""
    name, *more = header
    found = next((mark for mark in (";", "\t", "|", ",") if not more and mark in name), None)
    return f"; {found!r} seems to be the delimiter: save the file with commas (.csv) or tabs (.tsv)" if found else ""


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ConfigError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            check_names(file.schema_arrow.names, str(path))
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, EOFError, ValueError, OverflowError, LookupError) as error:
        # The last three are of values that Python cannot hold: a date beyond the year 9999, an unknown time zone.
        raise_if_machine(path, error)
        raise DataError(f"{path}: not a readable Parquet file (after row {number}): {reason(error)}") from error


def _open_zstd(path: Path, mode: str) -> IO[bytes]:
    import pyarrow

    stream: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return io.BufferedReader(stream)


def check_names(names: list[str], where: str) -> None:
    """DataError if two columns have one name: the rows would have only the last of them."""
    if len(set(names)) < len(names):
        raise DataError(f"{where}: two columns have one name: {names}")


def number_of(cell: str) -> float | None:
    """The number in the text of a cell, or None. Python's 1_0 and digits beyond ASCII are not numbers."""
    try:
        return float(cell) if cell.isascii() and "_" not in cell else None
    except ValueError:
        return None


def is_blank(text: str) -> bool:
    """Whether a text is empty or consists of spaces, control characters and zero-width characters."""
    return all(letter.isspace() or unicodedata.category(letter) in ("Cc", "Cf") for letter in text)


def kind_of(value: Any) -> str:
    """The kind of a value, for messages to the user."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
