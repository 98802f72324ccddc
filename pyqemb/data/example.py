"""Training examples in and out of files and folders.

`layouts` says which columns rows may have, `rows` which formats there are.
"""

import bz2
import gzip
import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from pyqemb.data.beir import is_beir, read_pairs
from pyqemb.data.files import atomic_file
from pyqemb.data.layouts import Example, UnusedColumns, examples_of
from pyqemb.data.rows import format_of, read_lines, read_rows, read_text
from pyqemb.data.splits import dataset_files
from pyqemb.errors import ConfigError, DataError

__all__ = ["Example", "read_examples", "read_lines", "read_located", "read_text", "to_row", "write_examples"]


def read_examples(path: str | Path, split: str | None = None, *, allow_empty: bool = False) -> Iterator[Example]:
    r"""Yield the examples of a file or a folder.

    A list of positives gives one example each. Columns that no layout knows are left out, with one warning that counts
    them.

    Args:
        path: a file of rows (.jsonl, .json, .csv, .tsv, .parquet; also compressed), or a folder: of such files in the
            layout of a dataset on the hub, in BEIR's layout, or of shards.
        split: of a folder: train, validation, test or another that its file names tell; None: train, or the only one
            there.
        allow_empty: accept empty queries and positives, for curation, which drops them.

    Raises:
        DataError: the file, line and column of what is not such a row; files of a folder that are not understood.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("pairs.jsonl").write_text('{"query": "q", "positive": "p", "negatives": ["n"]}\n')
        >>> [example.positive for example in read_examples("pairs.jsonl")]
        ['p']
    """
    return (example for _, example in read_located(path, split, allow_empty))


def read_located(
    path: str | Path, split: str | None = None, allow_empty: bool = False
) -> Iterator[tuple[str, Example]]:
    """`read_examples` with the place of each: "file:line" or "file:row"."""
    from pyqemb.data.shards import is_shards, read_shards  # imports pyarrow

    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if split is not None and (path.is_file() or is_shards(path)):
        raise DataError(f"{path}: has no splits to choose from; got split {split!r}")
    if path.is_file():
        yield from _read_files([path], path, allow_empty)
    elif is_shards(path):
        for shards in read_shards(path).values():
            for number, example in enumerate(shards, start=1):
                yield f"{path}:{number}", example
    elif is_beir(path):
        for where, query, positive in read_pairs(path, split, allow_empty):
            yield where, Example(query, positive)
    else:
        yield from _read_files(dataset_files(path, split), path, allow_empty)


def _read_files(files: list[Path], source: Path, allow_empty: bool) -> Iterator[tuple[str, Example]]:
    unused = UnusedColumns()
    for path in files:
        cells = format_of(path) in (".csv", ".tsv")
        empty = True
        for where, row in read_rows(path):
            for example in examples_of(row, where, unused, cells, allow_empty):
                empty = False
                yield where, example
        if empty:
            raise DataError(f"{path}: holds no examples")
    unused.warn(source)


def to_row(example: Example) -> dict[str, Any]:
    """The columns that the example has, as `read_examples` reads them."""
    row = {name: getattr(example, name) for name in Example.__slots__}
    return {name: value for name, value in row.items() if value is not None and value != ()}


def write_examples(path: str | Path, examples: Iterable[Example]) -> int:
    """Write examples as JSONL, all or nothing.

    Args:
        path: the file; a name that ends with .gz, .bz2 or .xz compresses it.
        examples: the examples, in the order of the lines.

    Returns:
        How many examples were written.

    Raises:
        ConfigError: the name ends with another format.
    """
    return write_rows(path, map(to_row, examples))


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as JSONL (.gz, .bz2 and .xz compress), all or nothing. Returns how many."""
    check_output(path)
    count = 0
    with atomic_file(path) as temporary, _open_writer(temporary) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def check_output(path: str | Path) -> None:
    """ConfigError where `write_rows` would write another format than the name tells."""
    if format_of(path) not in (".jsonl", ".json", "") or Path(path).suffix == ".zst":
        raise ConfigError(f"{path}: expected a name that ends with .jsonl, perhaps with .gz, .bz2 or .xz after it")


def _open_writer(path: Path) -> IO[bytes]:
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
    return opener(path, "wb")
