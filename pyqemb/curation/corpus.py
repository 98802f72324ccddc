"""The documents from which negatives are mined."""

from collections.abc import Iterator
from pathlib import Path

from pyqemb.data import beir
from pyqemb.data.example import read_examples
from pyqemb.data.rows import read_rows
from pyqemb.errors import DataError


def read_corpus(path: str | Path) -> Iterator[str]:
    """Yield the texts of a corpus.

    A corpus is a file of rows with `text` (and `title`, `_id`), the corpus of a BEIR folder, or the positives of
    examples.

    Raises a DataError that names file and line: a row without text, a duplicate id.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    files = beir.corpus_files(path) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: expected corpus.jsonl, or corpus/ with Parquet files")
    if path.is_file() and not _is_corpus(path):
        yield from (example.positive for example in read_examples(path))
        return
    places: dict[str, str] = {}
    for file in files:
        for where, row in read_rows(file):
            if "text" not in row:
                raise DataError(f"{where}: expected a document under 'text', the row has {sorted(row)}")
            key = beir.document_id(row, where)
            if key is not None and places.setdefault(key, where) != where:
                raise DataError(f"{where}: id {key!r} is that of {places[key].replace(f'{file}:', 'line ')} too")
            yield beir.document_text(row, where)


def _is_corpus(path: Path) -> bool:
    for _, row in read_rows(path):
        return "text" in row and not {"query", "anchor"} & set(row)
    raise DataError(f"{path}: holds no documents")
