"""Evaluation tasks: retrieval (BEIR layout), graded sentence pairs (STS), and translations (bitext).

The files of a folder determine its kind: a corpus, queries and qrels (`data.beir`); sts.jsonl with sentence1,
sentence2, score; bitext.jsonl with sentence1, sentence2. Each file may have another format of rows, and be compressed.
Examples from any other source are graded pairs or a retrieval task.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyqemb.data import beir
from pyqemb.data.arguments import check_fields
from pyqemb.data.columns import Columns
from pyqemb.data.example import Example, read_located
from pyqemb.data.rows import FORMATS, format_of, is_blank, number_of, read_rows
from pyqemb.data.tables import HUB, has_splits, is_saved, source_name
from pyqemb.errors import ConfigError, DataError


@dataclass(frozen=True)
class Retrieval:
    """A retrieval task.

    `qrels[query id][document id]` is a grade above 0, also for documents that are not in the corpus. `queries` are the
    judged queries.

    A query without a document above 0 counts, with every metric 0, as in trec_eval.
    """

    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: dict[str, dict[str, float]]
    instructions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        for name, given in (("qrels", self.qrels), ("instructions", self.instructions)):
            if unknown := sorted(given.keys() - self.queries.keys()):
                raise ConfigError(f"[Retrieval] {name} must be about the queries, {unknown[0]!r} is none of them")


@dataclass(frozen=True)
class Sts:
    """Graded sentence pairs: `scores[i]` is the similarity of `first[i]` and `second[i]`, higher is more similar."""

    first: list[str]
    second: list[str]
    scores: list[float]

    def __post_init__(self) -> None:
        _check_columns(self)


@dataclass(frozen=True)
class Bitext:
    """Translations: `second[i]` is the translation of `first[i]`."""

    first: list[str]
    second: list[str]

    def __post_init__(self) -> None:
        _check_columns(self)


def _check_columns(task: Any) -> None:
    """Check the fields of a task, which are lists of one length."""
    check_fields(task)
    for name, column in vars(task).items():
        if len(column) != len(task.first):
            raise ConfigError(
                f"[{type(task).__name__}] {name} must have an item for each of first, {len(task.first)}, "
                f"got {len(column)}"
            )


Task = Retrieval | Sts | Bitext


def load_task(source: Any, split: str | None = None, columns: Columns | None = None, name: str | None = None) -> Task:
    """Read a task. DataError names the invalid file and line, or the expected files.

    A warning counts empty queries and sentences.

    Args:
        source: a retrieval (BEIR), STS or bitext folder; a task; or examples, in any form that `read_examples` takes.
            Examples that all have a score are an STS task. Others are a retrieval task, whose corpus is the positives
            and negatives of all examples.
        split: the split of the judgments of a retrieval folder; None: test, or the only one, with a warning. For a
            DatasetDict or a dataset of the hub, its split; None: test.
        columns: the columns of examples, as in `read_examples`.
        name: the name of data in memory, for messages (default: the name of the type).
    """
    if isinstance(source, Retrieval | Sts | Bitext):
        return source
    if not is_folder(source):
        split = "test" if split is None and has_splits(source) else split
        examples = (example for _, example in read_located(source, split, columns, name=name))
        return _task_of_examples(examples, name or source_name(source))
    folder = Path(source)
    if columns:
        raise DataError(f"{folder}: columns is for examples; an evaluation folder has columns of its own")
    if beir.is_beir(folder) or beir.corpus_files(folder):
        found = beir.read_beir(folder, split)
        qrels = {
            query: {document: grade for document, grade in judged.items() if grade > 0}
            for query, judged in found.qrels.items()
        }
        _warn_of_empty("judged queries", [at for key, at in found.empty_queries.items() if key in found.queries])
        return Retrieval(found.queries, found.corpus, qrels, found.instructions)
    sts, bitext = find_pairs(folder, "sts"), find_pairs(folder, "bitext")
    if sts is not None:
        rows = [(*_sentences(row, at), _number(row, "score", at)) for at, row in _rows(sts)]
        return Sts([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])
    if bitext is not None:
        pairs = [_sentences(row, at) for at, row in _rows(bitext)]
        return Bitext([p[0] for p in pairs], [p[1] for p in pairs])
    raise DataError(
        f"{folder}: expected corpus.jsonl (retrieval), sts.jsonl or bitext.jsonl, found none of them; of examples, "
        "give the path of the file"
    )


def is_folder(source: Any) -> bool:
    """Whether a source of `load_task` is a folder with a task; DataError for a path that does not exist."""
    if not isinstance(source, str | Path) or str(source).startswith(HUB):
        return False
    if not Path(source).exists():
        raise DataError(f"{source}: no such folder or file")
    return Path(source).is_dir() and not is_saved(Path(source))


def _task_of_examples(examples: Iterable[Example], name: str) -> Task:
    """Graded pairs, or retrieval among the documents of all examples."""
    rows = list(examples)
    graded = [row for row in rows if row.score is not None]
    if graded and len(graded) < len(rows):
        raise DataError(
            f"{name}: {len(graded)} of {len(rows)} rows have a score; expected one in all (graded pairs) or none "
            "(retrieval)"
        )
    if graded:
        return Sts([row.query for row in rows], [row.positive for row in rows], [float(row.score or 0) for row in rows])
    documents: dict[str, str] = {}
    queries: dict[tuple[str, str | None], str] = {}
    qrels: dict[str, dict[str, float]] = {}
    for row in rows:
        query = queries.setdefault((row.query, row.instruction), f"query {len(queries)}")
        for text in (row.positive, *row.negatives):
            documents.setdefault(text, f"document {len(documents)}")
        qrels.setdefault(query, {})[documents[row.positive]] = 1.0
    return Retrieval(
        {key: text for (text, _), key in queries.items()},
        {key: text for text, key in documents.items()},
        qrels,
        {key: instruction for (_, instruction), key in queries.items() if instruction is not None},
    )


def find_pairs(folder: Path, name: str) -> Path | None:
    """The file NAME.jsonl, or of another format of rows. DataError if there are two."""
    found = [path for path in sorted(folder.glob(f"{name}.*")) if path.is_file() and format_of(path) in FORMATS]
    if len(found) > 1:
        raise DataError(f"{found[1]}: exists beside {found[0].name}; keep one of them")
    return found[0] if found else None


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    rows = list(read_rows(path))
    if not rows:
        raise DataError(f"{path}: empty")
    _warn_of_empty("rows", [at for at, row in rows if any(is_blank(text) for text in _sentences(row, at))])
    return rows


def _warn_of_empty(what: str, places: list[str]) -> None:
    if places:
        logging.getLogger("pyqemb").warning(
            "%s: %s %s have an empty text (first: %s); they are measured like the others",
            places[0].rpartition(":")[0], f"{len(places):,}", what, places[0],
        )  # fmt: skip


def _sentences(row: dict[str, Any], at: str) -> tuple[str, str]:
    return _text(row, "sentence1", at), _text(row, "sentence2", at)


def _text(row: dict[str, Any], key: str, at: str) -> str:
    if not isinstance(row.get(key), str):
        raise DataError(f"{at}: {key!r} must be text, got {row.get(key)!r}")
    return row[key]


def _number(row: dict[str, Any], key: str, at: str) -> float:
    value = row.get(key)
    if isinstance(value, str) and format_of(at.rpartition(":")[0]) in (".csv", ".tsv"):
        value = number_of(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise DataError(f"{at}: {key!r} must be a finite number, got {value!r}")
    return float(value)
