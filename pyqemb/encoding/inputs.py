"""Texts out of a file, row by row: a line each, JSONL or Parquet."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from pyqemb.data.example import read_lines
from pyqemb.errors import DataError

_IDS = ("_id", "id")


class Row(NamedTuple):
    """`id` is None where the file has none."""

    id: str | None
    text: str


def read_texts(path: Path, field: str = "text") -> Iterator[Row]:
    """Rows of .jsonl (also .gz) and .parquet files with a column `field` and perhaps _id or id; of any other file the lines.

    A title is put before the text, as in a BEIR corpus. Raises DataError naming file and row.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if ".jsonl" in path.name or path.suffix == ".json":
        for number, row in read_lines(path):
            yield _row(path, number, row, field)
    elif path.suffix == ".parquet":
        yield from _parquet(path, field)
    else:
        try:
            with path.open(encoding="utf-8", newline="\n") as file:
                for line in file:
                    yield Row(None, line.removesuffix("\n").removesuffix("\r"))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: is not UTF-8: {error}") from error


def parts(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """Lists of `size` rows, the last one shorter."""
    while part := list(islice(rows, size)):
        yield part


def _parquet(path: Path, field: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = [name for name in (field, "title", *_IDS) if name in file.schema_arrow.names]
        if field not in names:
            raise DataError(f"{path}: has no column {field!r}, but {', '.join(file.schema_arrow.names)}")
        number = 0
        for batch in file.iter_batches(columns=names):
            for row in batch.to_pylist():
                number += 1
                yield _row(path, number, row, field)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _row(path: Path, number: int, row: dict, field: str) -> Row:
    text, title = row.get(field), row.get("title")
    if not isinstance(text, str):
        raise DataError(f"{path}:{number}: expected a text under {field!r}, the row has {sorted(row)}")
    found = next((row[name] for name in _IDS if row.get(name) is not None), None)
    return Row(None if found is None else str(found), f"{title} {text}" if title else text)
