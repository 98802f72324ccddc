"""Reading texts from a file: rows of any format with a column of texts, or lines."""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from pyqemb.data import beir
from pyqemb.data.rows import FORMATS, check_is_file, describe_formats, format_of, read_rows, read_text
from pyqemb.errors import DataError


class Row(NamedTuple):
    """A text and its id, None if the file has none."""

    id: str | None
    text: str


def read_texts(path: Path, field: str = "text") -> Iterator[Row]:
    """Yield the rows of a file with a column `field` and optionally _id or id, or the lines of a .txt file.

    The file may be compressed.

    A title is put before the text, as in a BEIR corpus. A warning counts duplicate ids.

    Raises a DataError that names file and row: a missing text, ids that only some rows have, or an id that is not a
    single line of text.
    """
    check_is_file(path)
    if format_of(path) == ".txt":
        for number, line in read_text(path):
            if "\r" in line:
                raise DataError(f"{path}:{number}: a carriage return inside the line; save the file with \\n line ends")
            yield Row(None, line)
        return
    if format_of(path) not in FORMATS:
        raise DataError(f"{path}: unknown format; expected {describe_formats('.txt')}")
    seen: set[str] = set()
    with_ids: bool | None = None
    again = first = None
    for where, row in read_rows(path):
        text, key = row.get(field), beir.document_id(row, where)
        if text is None and field in row and format_of(path) in (".csv", ".tsv"):
            text = ""
        if not isinstance(text, str):
            raise DataError(f"{where}: expected a text under {field!r}, the row has {sorted(row)}")
        if with_ids is not None and with_ids != (key is not None):
            raise DataError(f"{where}: {'lacks' if with_ids else 'has'} an id, unlike the rows before it")
        with_ids = key is not None
        if key is not None:
            if key.splitlines() != [key]:
                raise DataError(f"{where}: the id {key!r} has a line end; ids are written one a line")
            if key in seen:
                again, first = (again or 0) + 1, first or f"{key!r} at {where}"
            seen.add(key)
        title = row.get("title")
        yield Row(key, f"{title} {text}" if title else text)
    if again:
        logging.getLogger("pyqemb").warning("%s: %s ids occur again (first: %s)", path, f"{again:,}", first)


def parts(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """Yield lists of `size` rows; the last one may be shorter."""
    while part := list(islice(rows, size)):
        yield part
