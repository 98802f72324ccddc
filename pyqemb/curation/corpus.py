"""Documents to choose negatives from."""

from collections.abc import Iterator
from pathlib import Path

from pyqemb.data.example import read_examples, read_lines
from pyqemb.errors import DataError


def read_corpus(path: str | Path) -> Iterator[str]:
    """Texts of a corpus, JSONL rows with `text` (and `title`, `_id`), of a folder's corpus.jsonl, or the positives of examples.

    Raises DataError naming file and line: a row without text, an id that is there twice.
    """
    path = Path(path)
    found = sorted(path.glob("corpus.jsonl*")) if path.is_dir() else [path]
    if not found or not found[0].exists():
        raise DataError(f"{path}: {'expected corpus.jsonl' if path.is_dir() else 'no such file or folder'}")
    if path.suffix == ".parquet" or not _is_corpus(found[0]):
        yield from (example.positive for example in read_examples(path))
        return
    lines: dict[str, int] = {}
    for number, row in read_lines(found[0]):
        text, title = row.get("text"), row.get("title")
        if not isinstance(text, str):
            raise DataError(f"{found[0]}:{number}: expected a document under 'text', the row has {sorted(row)}")
        key = row.get("_id", row.get("id"))
        if key is not None and lines.setdefault(str(key), number) != number:
            raise DataError(f"{found[0]}:{number}: id {str(key)!r} is that of line {lines[str(key)]} too")
        yield f"{title} {text}" if title else text


def _is_corpus(path: Path) -> bool:
    for _, row in read_lines(path):
        return "text" in row and not {"query", "anchor"} & set(row)
    raise DataError(f"{path}: holds no documents")
