"""Records of the readers and writers of examples."""

from pathlib import Path

from arguments_place import BAD_COLUMNS, BAD_ROWS, DATA, EXAMPLES, PLAIN, Place, Records, options, some

import pyqemb
from pyqemb.data import example as data_example
from pyqemb.data.example import Example


def add(records: Records, place: Place) -> None:
    record = records.record
    listed = lambda *args, **given: list(pyqemb.read_examples(*args, **given))  # noqa: E731
    listed.__wrapped__ = pyqemb.read_examples  # type: ignore[attr-defined]
    located = lambda *args, **given: list(data_example.read_located(*args, **given))  # noqa: E731
    located.__wrapped__ = data_example.read_located  # type: ignore[attr-defined]
    sources = lambda r: dict(source=some(r, PLAIN, EXAMPLES, place.file, str(place.file)))  # noqa: E731
    of_data = dict(source=DATA, split=r"\bsplits?\b", columns=r"\bcolumns?\b")
    reading = lambda r: sources(r) | options(r, columns={"query": "query"}, allow_empty=True)  # noqa: E731
    record(
        "pyqemb.read_examples",
        listed,
        reading,
        dict(source=BAD_ROWS, split=["train"], columns=BAD_COLUMNS),
        names=of_data,
    )
    record(
        "data.example.read_located",
        located,
        lambda r: reading(r) | options(r, name="rows"),
        dict(source=BAD_ROWS, split=["train"], columns=BAD_COLUMNS),
        names=of_data | {"source": f"{DATA}|rows"},
    )
    bad_names = [Path("rows.csv"), "rows.parquet", "rows.jsonl.zst", place.folder]
    path_names = dict(path=r"\bpath\b|expected a name|rows\.|at-all|folder|directory")
    record(
        "pyqemb.write_examples",
        pyqemb.write_examples,
        lambda r: dict(path=place.new(".jsonl"), examples=list(EXAMPLES)),
        dict(path=bad_names, examples=[[5], [None], [*EXAMPLES, 5], [{"query": "q"}], [Example(5, None)]]),
        fine=dict(path=["", "text", "\0"]),
        names=path_names | {"examples": "examples|Example"},
        cheap=False,
    )
    record(
        "data.example.write_rows",
        data_example.write_rows,
        lambda r: dict(path=place.new(".jsonl"), rows=list(PLAIN)),
        dict(path=bad_names, rows=[[{"a": object()}], [5]]),
        fine=dict(path=["", "text", "\0"]),
        names=path_names,
        cheap=False,
    )
    record(
        "data.example.check_output",
        data_example.check_output,
        lambda r: dict(path="a.jsonl"),
        dict(path=bad_names[:3]),
        names=path_names,
        fine=dict(path=["", "text", "\0"]),
    )
    record(
        "data.example.check_source",
        data_example.check_source,
        lambda r: dict(source=place.file),
        dict(source=["no-such", Path("no-such")]),
        names=dict(source="no-such"),
    )
    record("data.example.to_row", data_example.to_row, lambda r: dict(example=r.choice(EXAMPLES)))
