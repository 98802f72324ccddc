"""Reading and writing of training examples.

`layouts` defines the columns of rows, `rows` the file formats, `tables` the objects in memory.
"""

import bz2
import gzip
import json
import lzma
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from pyqemb.data.arguments import check, check_fields, checked
from pyqemb.data.beir import is_beir, read_pairs
from pyqemb.data.columns import Columns
from pyqemb.data.files import atomic_file
from pyqemb.data.layouts import Example, Layout
from pyqemb.data.rows import format_of, kind_of, read_lines, read_rows, read_text
from pyqemb.data.splits import dataset_files
from pyqemb.data.tables import HUB, check_is_table, is_saved, open_hub, open_saved, read_table, source_name
from pyqemb.errors import ConfigError, DataError

__all__ = ["Example", "read_examples", "read_lines", "read_located", "read_text", "to_row", "write_examples"]


@checked
def read_examples(
    source: Any, split: str | None = None, *, columns: Columns | None = None, allow_empty: bool = False
) -> Iterator[Example]:
    r"""Yield the examples of a file, a folder, a table in memory or a dataset of the hub.

    A row with several positives gives one example for each. In files, columns that no layout knows are ignored, and one
    warning counts them, because files often carry the ids and sources of other tools. In other data, and if `columns`
    is given, they are errors, because such a column is likely to be a query, a positive or a negative by another name.

    Args:
        source: a path, the address of a dataset on the Hugging Face Hub, or rows in memory:

            - a file of rows (.jsonl, .json, .csv, .tsv, .parquet; also compressed);
            - a folder of such files in the layout of a dataset on the hub, in BEIR's layout, of shards, or saved by
              `save_to_disk` of datasets;
            - "hub://ORG/NAME", "hub://ORG/NAME@REVISION/SUBSET": downloaded by datasets unless it is cached;
            - a Dataset or DatasetDict of datasets, a pandas or Polars DataFrame, an Arrow table;
            - a list of dicts or of Examples.
        split: the split of a folder, a hub dataset or a DatasetDict: train, validation, test or another one; None:
            train, or the only one.
        columns: pyqemb's names and the columns that they are read from, {"query": "question", "negatives": ["hard_1",
            "hard_2"], "ignore": ["id"]}; the columns of `ignore` are not read (default: the names of a known layout).
        allow_empty: accept empty queries and positives, for curation, which drops them.

    Returns:
        An iterator of Examples; rows are read as it advances.

    Raises:
        DataError: an invalid row, with file, line and column; unknown files in a folder.
        ConfigError: `columns` is invalid, or a package is missing.

    Example:
        >>> rows = [{"question": "q", "positive": "p", "negatives": ["n"], "id": 1}]
        >>> examples = pyqemb.read_examples(rows, columns={"query": "question", "ignore": "id"})
        >>> [example.query for example in examples]
        ['q']
    """
    return (example for _, example in read_located(source, split, columns, allow_empty))


@checked
def read_located(
    source: Any,
    split: str | None = None,
    columns: Columns | None = None,
    allow_empty: bool = False,
    name: str | None = None,
) -> Iterator[tuple[str, Example]]:
    """`read_examples` with the place of each: "file:line", "file:row", or "NAME[index]" in memory (`name`)."""
    if isinstance(source, str) and source.startswith(HUB):
        yield from _read_table(open_hub(source), split, columns, allow_empty, source)
    elif not isinstance(source, str | Path):
        yield from _read_table(source, split, columns, allow_empty, name)
    else:
        yield from _read_path(Path(source), split, columns, allow_empty)


@checked
def check_source(source: Any, name: str | None = None) -> None:
    """DataError for a path that does not exist, and for what is no table; `name` is that of the argument."""
    if not isinstance(source, str | Path):
        check_is_table(source, name or source_name(source))
    elif not str(source).startswith(HUB) and not Path(source).exists():
        _raise_missing(source)


def _raise_missing(source: str | Path) -> None:
    path = Path(source)
    like_an_id = not path.suffix and len(path.parts) == 2 and not path.is_absolute()
    hint = f" (a dataset of the hub is written {HUB}{source})" if like_an_id else ""
    raise DataError(f"{source}: no such file or folder{hint}")


def _read_path(
    path: Path, split: str | None, columns: Columns | None, allow_empty: bool
) -> Iterator[tuple[str, Example]]:
    from pyqemb.data.shards import is_shards, read_shards  # imports pyarrow

    check_source(path)
    if split is not None and (path.is_file() or is_shards(path)):
        raise DataError(f"{path}: has no splits to choose from; got split {split!r}, leave it out")
    if columns and (is_shards(path) or is_beir(path)):
        raise DataError(f"{path}: columns is for rows; shards and BEIR folders have columns of their own")
    if path.is_file():
        yield from _read_files([path], path, columns, allow_empty)
    elif is_shards(path):
        for shards in read_shards(path).values():
            for number, example in enumerate(shards, start=1):
                yield f"{path}:{number}", example
    elif is_saved(path):
        yield from _read_table(open_saved(path), split, columns, allow_empty, str(path))
    elif is_beir(path):
        for where, query, positive in read_pairs(path, split, allow_empty):
            yield where, Example(query, positive)
    else:
        yield from _read_files(dataset_files(path, split), path, columns, allow_empty)


def _read_files(
    files: list[Path], source: Path, columns: Columns | None, allow_empty: bool
) -> Iterator[tuple[str, Example]]:
    layout = Layout(columns, cells=format_of(files[0]) in (".csv", ".tsv"), allow_empty=allow_empty)
    for path in files:
        empty = True
        for where, row in read_rows(path):
            for example in layout.examples(row, where):
                empty = False
                yield where, example
        if empty:
            raise DataError(f"{path}: holds no examples")
    layout.finish(source)


def _read_table(
    source: Any, split: str | None, columns: Columns | None, allow_empty: bool, name: str | None
) -> Iterator[tuple[str, Example]]:
    layout = Layout(columns, in_memory=True, allow_empty=allow_empty)
    name = name or source_name(source)
    empty = True
    for where, row in read_table(source, split, name):
        if isinstance(row, Example):
            row = to_row(row)
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: expected a dict or an Example, got {kind_of(row)}")
        if odd := [key for key in row if not isinstance(key, str)]:
            raise DataError(f"{where}: expected names of columns that are text, got {odd[0]!r:.80}")
        for example in layout.examples({key: _plain(value) for key, value in row.items()}, where):
            empty = False
            yield where, example
    if empty:
        raise DataError(f"{name}: holds no examples")
    layout.finish(name)


def _plain(value: Any) -> Any:
    """Convert a tuple, or an array or number of NumPy, to its type in JSON."""
    if value is None or isinstance(value, str):
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


@checked
def to_row(example: Example) -> dict[str, Any]:
    """The columns of the example, as `read_examples` reads them."""
    row = {name: getattr(example, name) for name in Example.__slots__}
    return {name: value for name, value in row.items() if value is not None and value != ()}


@checked
def write_examples(path: str | Path, examples: Iterable[Example]) -> int:
    """Write examples as JSONL, completely or not at all.

    Args:
        path: the file; a name that ends with .gz, .bz2 or .xz compresses it.
        examples: the examples, in the order of the lines.

    Returns:
        The number of examples written.

    Raises:
        ConfigError: the name ends with another format.

    Example:
        >>> examples = pyqemb.read_examples([{"query": "q", "positive": "p"}])
        >>> pyqemb.write_examples("pairs.jsonl.gz", examples)
        1
    """
    return write_rows(path, map(_checked_row, examples))


def _checked_row(example: Example) -> dict[str, Any]:
    check("write_examples", "examples", example, Example)
    check_fields(example)
    return to_row(example)


@checked
def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows as JSONL (.gz, .bz2 and .xz compress), completely or not at all. Returns their number."""
    check_output(path)
    count = 0
    with atomic_file(path) as temporary, _open_writer(temporary) as file:
        for row in rows:
            try:
                line = json.dumps(row, ensure_ascii=False).encode()
            except (TypeError, ValueError) as error:
                raise TypeError(f"[write_rows] rows[{count}] must be values that JSON has: {error}") from error
            file.write(line + b"\n")
            count += 1
    return count


@checked
def check_output(path: str | Path) -> None:
    """ConfigError if the suffix of the name is not a format that `write_rows` writes."""
    if format_of(path) not in (".jsonl", ".json", "") or Path(path).suffix == ".zst":
        raise ConfigError(f"{path}: expected a name that ends with .jsonl, perhaps with .gz, .bz2 or .xz after it")


def _open_writer(path: Path) -> IO[bytes]:
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
    return opener(path, "wb")
