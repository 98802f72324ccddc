"""Rows in memory or in the formats of other libraries: datasets, pandas, Polars, Arrow, lists of dicts.

The libraries are looked up in sys.modules, because their objects exist only if they are imported.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from pyqemb.data.folder import member, read_object, shown
from pyqemb.data.rows import Row, check_names
from pyqemb.data.splits import choose
from pyqemb.errors import ConfigError, DataError

HUB = "hub://"
_HUB_ADDRESS = re.compile(r"hub://([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/([\w.-]+))?")
_BATCH = 1024


def read_table(source: Any, split: str | None = None, name: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of rows in memory; the place is "NAME[index]", from 0.

    A row is a dict, or an item of the list.

    Args:
        source: a Dataset or DatasetDict of the package datasets, a pandas or Polars DataFrame, an Arrow table, or an
            iterable of rows.
        split: the split of a DatasetDict; None: train, or the only one.
        name: the name of the data in messages (default: the name of the type).

    Raises:
        DataError: an unsupported object, a missing split, a table that cannot be read.
    """
    name = name or source_name(source)
    if _is(source, "datasets", "DatasetDict", "IterableDatasetDict"):
        source = source[choose(name, source, split)]
    elif split is not None:
        raise DataError(f"{name}: has no splits to choose from; got split {split!r}, leave it out")
    for number, row in enumerate(_rows(source, name)):
        yield f"{name}[{number}]", row


def source_name(source: Any) -> str:
    """The name of a source in messages and reports: its path, or the type of an object in memory."""
    return str(source) if isinstance(source, str | Path) else type(source).__name__


def is_table(source: Any) -> bool:
    """Whether an object is a table of one of the libraries."""
    return (
        _is(source, "datasets", "Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict")
        or _is(source, "pandas", "DataFrame")
        or _is(source, "polars", "DataFrame", "LazyFrame")
        or _is(source, "pyarrow", "Table", "RecordBatch")
    )


def has_splits(source: Any) -> bool:
    """Whether a source is a dataset with splits: a DatasetDict, also a saved one, or a dataset of the hub."""
    if isinstance(source, str | Path):
        return str(source).startswith(HUB) or (Path(source) / "dataset_dict.json").is_file()
    return _is(source, "datasets", "DatasetDict", "IterableDatasetDict")


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of datasets wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def open_saved(folder: Path) -> Any:
    """The Dataset or DatasetDict of a folder that `save_to_disk` wrote."""
    datasets = _import_datasets(folder)
    _check_inside(folder)
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # of Arrow, JSON, the file system or datasets
        raise DataError(f"{folder}: load_from_disk cannot read it: {_one_line(error)}") from error


def _check_inside(folder: Path) -> None:
    """DataError if a saved dataset names files outside of its folder, which load_from_disk would read."""
    splits = read_object(folder, "dataset_dict.json").get("splits")
    for place in [member(folder, str(split)) for split in splits] if isinstance(splits, list) else [folder]:
        files = read_object(place, "state.json").get("_data_files")
        for file in files if isinstance(files, list) else []:
            name = file.get("filename") if isinstance(file, dict) else None
            if not isinstance(name, str) or len(PurePosixPath(name).parts) != 1 or name == "..":
                raise DataError(f"{place / 'state.json'}: may name files of its own folder only, got {shown(name)}")
            member(place, name)


def open_hub(address: str) -> Any:
    """The DatasetDict of hub://ORG/NAME, hub://ORG/NAME@REVISION/SUBSET; it is downloaded unless it is cached.

    Raises:
        ConfigError: an invalid address, or datasets is missing. DataError: it cannot be loaded.
    """
    match = _HUB_ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(f"{address}: expected {HUB}ORG/NAME, optionally with @REVISION and /SUBSET")
    repository, revision, subset = match.groups()
    datasets = _import_datasets(address)
    if Path(repository).exists():  # load_dataset would read this local folder instead
        raise DataError(f"{address}: the folder {repository} is here; rename it, or give its path without {HUB}")
    try:
        return datasets.load_dataset(repository, subset, revision=revision)
    except Exception as error:  # of the network, the hub, the files or datasets
        hint = f" (a subset is written as {HUB}ORG/NAME/SUBSET)" if isinstance(error, ValueError) and not subset else ""
        raise DataError(f"{address}: cannot be loaded: {_one_line(error)}{hint}") from error


def _rows(source: Any, name: str) -> Iterator[Any]:
    if _is(source, "datasets", "Dataset") and source.format["type"] != "custom":  # a transform may produce other rows
        plain = source.with_format("arrow", columns=source.format["columns"])
        source = (row for table in plain.iter(batch_size=_BATCH) for row in _rows_of_arrow(table, name))
    elif _is(source, "pandas", "DataFrame"):
        source = _rows_of_arrow(_arrow_of_pandas(source, name), name)
    elif _is(source, "polars", "DataFrame"):
        source = source.iter_rows(named=True)
    elif _is(source, "polars", "LazyFrame"):
        raise DataError(f"{name}: is a LazyFrame; give its collect()")
    elif _is(source, "pyarrow", "Table", "RecordBatch"):
        source = _rows_of_arrow(source, name)
    check_is_table(source, name)
    yield from source


def check_is_table(source: Any, name: str) -> None:
    """DataError for an object that `read_table` does not read."""
    is_rows = isinstance(source, Iterable) and not isinstance(source, str | bytes | dict | type)
    if not (is_rows or is_table(source)):
        raise DataError(
            f"{name}: expected a Dataset or DatasetDict, a pandas or Polars DataFrame, an Arrow table, a list of "
            f"dicts or Examples, or a path, got {_shown(source)}"
        )


def _arrow_of_pandas(frame: Any, name: str) -> Any:
    import pyarrow

    if odd := [column for column in frame.columns if not isinstance(column, str)]:
        raise DataError(f"{name}: expected names of columns that are text, got {odd[0]!r}")
    try:
        return pyarrow.Table.from_pandas(frame, preserve_index=False)
    except (pyarrow.ArrowException, ValueError, TypeError) as error:
        raise DataError(f"{name}: {_one_line(error)}") from error


def _rows_of_arrow(table: Any, name: str) -> Iterator[Row]:
    import pyarrow

    check_names(table.schema.names, name)
    for start in range(0, table.num_rows, _BATCH):
        rows = table.slice(start, _BATCH)
        try:
            rows.validate(full=True)  # Arrow trusts the offsets in a file, and reads beyond its end
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{name}: is damaged: {_one_line(error)}") from error
        try:
            found = rows.to_pylist()
        except (pyarrow.ArrowException, ValueError, OverflowError, LookupError) as error:
            # Values that Python cannot hold: text that is not UTF-8, a date beyond the year 9999, an unknown time zone.
            raise DataError(f"{name}: cannot be read from row {start}: {_one_line(error)}") from error
        yield from found


def _is(source: Any, library: str, *names: str) -> bool:
    """Whether an object is of one of the classes of a library."""
    module = sys.modules.get(library)
    return module is not None and isinstance(source, tuple(getattr(module, name, ()) or () for name in names))


def _import_datasets(source: Any) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ConfigError(f"{source}: reading it needs datasets: pip install 'pyqemb[datasets]'") from error
    return datasets


def _shown(source: Any) -> str:
    """The type of an unsupported object; the keys of a dict."""
    keys = f" with the keys {', '.join(map(repr, list(source)[:5]))}" if isinstance(source, dict) and source else ""
    return type(source).__name__ + keys


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
