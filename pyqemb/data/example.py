"""What a training row is, and how rows come from JSONL, Parquet and BEIR files.

Native columns are query, positive, negatives, instruction, task, and for objectives beside the contrastive one score, scores,
query_embedding, positive_embedding. The columns of sentence-transformers (anchor, positive, negative or negative_1 ...
negative_n; sentence1, sentence2, score or label) are read as they are. Other columns are ignored.
"""

import codecs
import gzip
import json
import lzma
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pyqemb.data.files import atomic_file
from pyqemb.errors import ConfigError, DataError

_NUMBERED_NEGATIVE = re.compile(r"negative_(\d+)")
_DAMAGED = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)


@dataclass(frozen=True, slots=True)
class Example:
    """One training pair. `instruction` is the query's task sentence (None: raw query), `task` names its kind or source.

    score: how alike query and positive are, of graded pairs.
    scores: a teacher's scores of the positive and the negatives, in their order.
    query_embedding, positive_embedding: a teacher's vectors.
    """

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    instruction: str | None = None
    task: str | None = None
    score: float | None = None
    scores: tuple[float, ...] = ()
    query_embedding: tuple[float, ...] = ()
    positive_embedding: tuple[float, ...] = ()


def read_examples(path: str | Path, split: str | None = None) -> Iterator[Example]:
    """Yield the examples of a JSONL file (.jsonl, .json, also .gz or .xz), a Parquet file, or a folder: of shards, of Parquet files, or BEIR.

    A list of positives gives one example each. Of a BEIR folder the judgements of `split` are read; None: those of
    `train`, or the only ones there. Raises DataError naming file, line and column for anything that is not such a row.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir():
        yield from _read_folder(path, split)
        return
    rows = _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)
    empty = True
    for where, row in rows:
        for example in _examples_of_row(row, where):
            empty = False
            yield example
    if empty:
        raise DataError(f"{path}: holds no examples")


def to_row(example: Example) -> dict[str, Any]:
    """The columns that the example has, as `read_examples` reads them."""
    row = {name: getattr(example, name) for name in Example.__slots__}
    return {name: value for name, value in row.items() if value is not None and value != ()}


def write_examples(path: str | Path, examples: Iterable[Example]) -> int:
    """Write examples as JSONL (.gz and .xz compress), all or nothing. Returns how many."""
    count = 0
    with atomic_file(path) as temporary, _open_writer(temporary) as file:
        for example in examples:
            file.write(json.dumps(to_row(example), ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


@contextmanager
def open_bytes(path: str | Path) -> Iterator[IO[bytes]]:
    """Open for reading, decompressing .gz and .xz. Damage met inside the block becomes a DataError."""
    path = Path(path)
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            yield file
    except _DAMAGED as error:
        raise DataError(f"{path}: damaged or cut short: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_text(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) of a UTF-8 file, plain or compressed."""
    with open_bytes(path) as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                yield number, raw.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}:{error.start + 1}: not UTF-8: {error.reason}") from error


def read_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a JSONL file, plain or compressed. Blank lines are skipped."""
    for number, line in read_text(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}:{error.colno}: not JSON: {error.msg}") from error
        except RecursionError as error:
            raise DataError(f"{path}:{number}:1: not a row: nested too deeply") from error
        if not isinstance(row, dict):
            raise DataError(f'{path}:{number}:1: expected an object like {{"query": ...}}, got {_kind(row)}')
        # Half of a surrogate pair is legal in JSON but is no text: tokenizers cannot encode it.
        if "\\u" in line and _has_surrogate(row):
            raise DataError(f"{path}:{number}:{line.find(chr(92) + 'u') + 1}: an escape is half of a surrogate pair")
        yield number, row


def _bad(where: str, key: str, message: str) -> DataError:
    return DataError(f"{where}: column {key!r} {message}")


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in read_lines(path):
        yield f"{path}:{number}", row


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ConfigError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file (after row {number}): {error}") from error


def _examples_of_row(row: dict[str, Any], where: str) -> Iterator[Example]:
    query = _text(row, _first_of(row, "query", "anchor", "sentence1"), where)
    second = _first_of(row, "positive", "sentence2")
    if not isinstance(row.get(second), list):
        positives = [_text(row, second, where)]
    else:
        positives = _texts(row, second, where)
        if not positives:
            raise _bad(where, second, "is an empty list")
    numbered = sorted((int(match[1]), key) for key in row if (match := _NUMBERED_NEGATIVE.fullmatch(key)))
    negatives: list[str] = []
    for key in ("negatives", "negative", *(key for _, key in numbered)):
        negatives += _texts(row, key, where)
    instruction = _text(row, "instruction", where, optional=True)
    task = _text(row, "task", where, optional=True)
    graded = _numbers(row, _first_of(row, "score", "label"), where, many=False)
    scores, *vectors = (_numbers(row, key, where) for key in ("scores", "query_embedding", "positive_embedding"))
    if scores and (len(positives) > 1 or len(scores) != 1 + len(negatives)):
        raise _bad(
            where,
            "scores",
            f"must hold {1 + len(negatives)} numbers, one for the positive and each negative, got {len(scores)}",
        )
    if any(vectors) and len(positives) > 1:
        raise _bad(where, second, "must be one text beside a teacher's vectors")
    for positive in positives:
        yield Example(
            query, positive, tuple(negatives), instruction, task, graded[0] if graded else None, scores, *vectors
        )


def _first_of(row: dict[str, Any], name: str, *others: str) -> str:
    """The name that the row has, `name` where it has none."""
    return next((key for key in (name, *others) if key in row), name)


def _numbers(row: dict[str, Any], key: str, where: str, many: bool = True) -> tuple[float, ...]:
    """A column that may be absent or null, a list of numbers or, unless `many`, one."""
    value = row.get(key)
    if value is None:
        return ()
    values = value if many else [value]
    if not isinstance(values, list):
        raise _bad(where, key, f"must be a list of numbers, got {_kind(value)}")
    for item in values:
        if isinstance(item, bool) or not isinstance(item, int | float) or not math.isfinite(item):
            raise _bad(where, key, f"must hold finite numbers, got {item!r}")
    return tuple(float(item) for item in values)


def _text(row: dict[str, Any], key: str, where: str, optional: bool = False) -> Any:
    value = row.get(key)
    if isinstance(value, str) or (optional and value is None):
        return value
    if key not in row:
        raise _bad(where, key, f"is missing; the row has {sorted(row)}")
    raise _bad(where, key, f"must be text, got {_kind(value)}")


def _texts(row: dict[str, Any], key: str, where: str) -> list[str]:
    """A column that may be absent, null, one text or a list of texts."""
    value = row.get(key)
    if value is None:
        return []
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list):
        raise _bad(where, key, f"must be text or a list of texts, got {_kind(value)}")
    for index, item in enumerate(values):
        if not isinstance(item, str):
            raise _bad(where, key, f"must hold texts, got {_kind(item)} at index {index}")
    return values


def _read_folder(folder: Path, split: str | None) -> Iterator[Example]:
    from pyqemb.data.shards import is_shards, read_shards

    parquet = sorted(folder.glob("*.parquet"))
    if is_shards(folder):
        for shards in read_shards(folder).values():
            yield from shards
    elif parquet and not (folder / "qrels").exists():
        for path in parquet:
            yield from read_examples(path)
    else:
        yield from _read_beir(folder, split)


def _read_beir(folder: Path, split: str | None) -> Iterator[Example]:
    qrels = sorted((folder / "qrels").glob("*.tsv"))
    chosen = [path for path in qrels if path.stem == (split or "train")] or ([] if split else qrels)
    if len(chosen) != 1:
        found, wanted = ", ".join(path.name for path in qrels) or "none", f"qrels/{split or 'train'}.tsv"
        raise DataError(f"{folder}: needs {wanted}{'' if split else ' or one single qrels/*.tsv'}; found {found}")
    corpus = {key: text for key, text in _beir_texts(folder, "corpus")}
    queries = {key: text for key, text in _beir_texts(folder, "queries")}
    empty = True
    for number, line in read_text(chosen[0]):
        fields = line.split("\t")
        if not line.strip() or (number == 1 and not _is_number(fields[-1])):
            continue
        where = f"{chosen[0]}:{number}"
        if len(fields) != 3 or not _is_number(fields[2]):
            raise DataError(f"{where}:1: expected query-id, corpus-id, score with tabs between, got {line[:80]!r}")
        for key, texts, name in ((fields[0], queries, "queries"), (fields[1], corpus, "corpus")):
            if key not in texts:
                raise DataError(f"{where}: id {key!r} is not in {name}.jsonl")
        if float(fields[2]) > 0:
            empty = False
            yield Example(queries[fields[0]], corpus[fields[1]])
    if empty:
        raise DataError(f"{chosen[0]}: no judgement above 0")


def _beir_texts(folder: Path, name: str) -> Iterator[tuple[str, str]]:
    found = [path for suffix in ("", ".gz", ".xz") if (path := folder / f"{name}.jsonl{suffix}").is_file()]
    if not found:
        raise DataError(f"{folder}: a BEIR folder needs {name}.jsonl")
    for number, row in read_lines(found[0]):
        where = f"{found[0]}:{number}"
        title = _text(row, "title", where, optional=True)
        text = _text(row, "text", where)
        yield str(row["_id"]) if "_id" in row else _text(row, "_id", where), f"{title} {text}" if title else text


def _open_writer(path: Path) -> IO[bytes]:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    return opener(path, "wb")


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, dict):
        return any(_has_surrogate(item) for pair in value.items() for item in pair)
    return isinstance(value, list) and any(map(_has_surrogate, value))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
