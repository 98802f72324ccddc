"""What there is to measure on: retrieval (BEIR layout), graded sentence pairs (STS), and translations (bitext).

A folder's kind is told by its files: corpus.jsonl + queries.jsonl + qrels/SPLIT.tsv; sts.jsonl with sentence1, sentence2,
score; bitext.jsonl with sentence1, sentence2. Each may end in .gz or .xz.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyqemb.data.example import read_lines, read_text
from pyqemb.errors import DataError

_SUFFIXES = ("", ".gz", ".xz")


@dataclass(frozen=True)
class Retrieval:
    """`qrels[query id][document id]` is a grade above 0; every judged query is among `queries`."""

    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: dict[str, dict[str, float]]
    instructions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sts:
    first: list[str]
    second: list[str]
    scores: list[float]


@dataclass(frozen=True)
class Bitext:
    first: list[str]
    second: list[str]


Task = Retrieval | Sts | Bitext


def load_task(folder: str | Path, split: str = "test") -> Task:
    """Read the task of a folder. DataError names the file and line that is wrong, or what was looked for."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    corpus, sts, bitext = (_find(folder, name) for name in ("corpus.jsonl", "sts.jsonl", "bitext.jsonl"))
    if corpus is not None:
        return _load_retrieval(folder, corpus, split)
    if sts is not None:
        rows = [
            (_text(row, "sentence1", at), _text(row, "sentence2", at), _number(row, "score", at))
            for at, row in _rows(sts)
        ]
        return Sts([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])
    if bitext is not None:
        pairs = [(_text(row, "sentence1", at), _text(row, "sentence2", at)) for at, row in _rows(bitext)]
        return Bitext([p[0] for p in pairs], [p[1] for p in pairs])
    raise DataError(f"{folder}: expected corpus.jsonl (retrieval), sts.jsonl or bitext.jsonl, found none of them")


def _load_retrieval(folder: Path, corpus_file: Path, split: str) -> Retrieval:
    corpus: dict[str, str] = {}
    for at, row in _rows(corpus_file):
        title, key = row.get("title") or "", _identifier(row, at)
        if key in corpus:
            raise DataError(f"{at}: the id {key!r} occurs twice")
        corpus[key] = f"{title} {_text(row, 'text', at)}".strip()
    queries_file = _find(folder, "queries.jsonl")
    if queries_file is None:
        raise DataError(f"{folder}: expected queries.jsonl beside {corpus_file.name}")
    texts: dict[str, str] = {}
    instructions: dict[str, str] = {}
    for at, row in _rows(queries_file):
        key = _identifier(row, at)
        texts[key] = _text(row, "text", at)
        if row.get("instruction") is not None:
            instructions[key] = _text(row, "instruction", at)
    qrels = _load_qrels(folder, split, texts, corpus)
    queries = {key: texts[key] for key in qrels}
    return Retrieval(queries, corpus, qrels, {key: text for key, text in instructions.items() if key in queries})


def _load_qrels(
    folder: Path, split: str, queries: dict[str, str], corpus: dict[str, str]
) -> dict[str, dict[str, float]]:
    path = folder / "qrels" / f"{split}.tsv"
    if not path.is_file():
        found = ", ".join(sorted(p.stem for p in (folder / "qrels").glob("*.tsv"))) or "none"
        raise DataError(f"{path}: no such file; splits found: {found}")
    qrels: dict[str, dict[str, float]] = {}
    for number, line in read_text(path):
        fields = line.split("\t")
        if not line.strip() or (number == 1 and not _is_number(fields[-1])):
            continue
        if len(fields) != 3 or not _is_number(fields[2]):
            raise DataError(
                f"{path}:{number}: expected query-id, corpus-id and score with tabs between, got {line[:80]!r}"
            )
        query, document, grade = fields[0], fields[1], float(fields[2])
        if query not in queries:
            raise DataError(f"{path}:{number}: query {query!r} is not in queries.jsonl")
        if document not in corpus:
            raise DataError(f"{path}:{number}: document {document!r} is not in corpus.jsonl")
        if grade > 0:
            qrels.setdefault(query, {})[document] = grade
    if not qrels:
        raise DataError(f"{path}: no judgement above 0")
    return qrels


def _find(folder: Path, name: str) -> Path | None:
    return next((path for suffix in _SUFFIXES if (path := folder / (name + suffix)).is_file()), None)


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    rows = [(f"{path}:{number}", row) for number, row in read_lines(path)]
    if not rows:
        raise DataError(f"{path}: empty")
    return rows


def _text(row: dict[str, Any], key: str, at: str) -> str:
    if not isinstance(row.get(key), str):
        raise DataError(f"{at}: {key!r} must be text, got {row.get(key)!r}")
    return row[key]


def _identifier(row: dict[str, Any], at: str) -> str:
    key = row.get("_id", row.get("id"))
    if not isinstance(key, (str, int)) or isinstance(key, bool):
        raise DataError(f"{at}: '_id' must be text, got {key!r}")
    return str(key)


def _number(row: dict[str, Any], key: str, at: str) -> float:
    value = row.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value != value:
        raise DataError(f"{at}: {key!r} must be a number, got {value!r}")
    return float(value)


def _is_number(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False
