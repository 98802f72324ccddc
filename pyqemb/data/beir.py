"""BEIR folders: a corpus, queries, and judgments of which documents answer which query.

FOLDER/corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv        BEIR; any format of rows, any compression; TREC qrels
FOLDER/corpus/, queries/, qrels/ (or data/, default/)      the repositories of mteb on the hub: Parquet files or others

Rows have _id or id, and text, optionally title (documents) or instruction (queries); judgments have query-id, corpus-id
and score.
"""

import csv
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyqemb.data.rows import FORMATS, Row, format_of, is_blank, number_of, read_rows, read_text
from pyqemb.data.splits import canonical, choose, data_files, split_of
from pyqemb.errors import DataError

_QRELS = ("qrels", "data", "default")
_TABLES = (".tsv", ".txt", ".qrels", ".trec")  # of judgments, possibly without a header
_COLUMNS = ("query-id", "corpus-id", "score")


@dataclass(frozen=True)
class Beir:
    """A BEIR folder in memory.

    `qrels[query id][document id]` is the grade in the file, also for documents that are not in the corpus. `queries`
    holds all judged queries, including those without a document above 0. `empty_documents` and `empty_queries` hold the
    place (file:line) of each empty text, by id.
    """

    corpus: dict[str, str]
    queries: dict[str, str]
    instructions: dict[str, str]
    qrels: dict[str, dict[str, float]]
    files: list[Path]  # of the judgments
    empty_documents: dict[str, str] = field(default_factory=dict)
    empty_queries: dict[str, str] = field(default_factory=dict)


def is_beir(folder: Path) -> bool:
    """Whether a folder holds judgments, or a corpus and queries."""
    return (folder / "qrels").is_dir() or (bool(corpus_files(folder)) and bool(_tables(folder, "queries")))


def corpus_files(folder: Path) -> list[Path]:
    """The files of the corpus, if there is one."""
    return _tables(folder, "corpus")


def splits(folder: Path) -> list[str]:
    """The splits that have judgments."""
    return sorted(_judgement_files(folder))


def read_beir(folder: Path, split: str | None) -> Beir:
    """Read a folder; `split` None: test, or the only one.

    One warning counts the judged queries and documents that are missing; such a document stays in `qrels`, as in mteb.
    A pair that is judged twice gets the last grade, with a warning if the grades differ.

    Raises:
        DataError: a missing file, a duplicate id, a grade that is not a finite number, no judgment above 0.
    """
    found = _judgement_files(folder)
    split = choose(folder, found, split, "test")
    files = found[split]
    empty_documents: dict[str, str] = {}
    empty_queries: dict[str, str] = {}
    instructions: dict[str, str] = {}
    corpus = {key: text for _, key, text, _ in _texts(folder, "corpus", split, empty_documents)}
    queries = {}
    for where, key, text, row in _texts(folder, "queries", split, empty_queries):
        queries[key] = text
        if row.get("instruction") is not None:
            instructions[key] = _text(row, "instruction", where)
    for where, row in _rows(folder, _tables(folder, "instruction"), split):
        instructions[_identifier(row, where, "query-id")] = _text(row, "instruction", where)
    qrels = _qrels(files, queries, corpus)
    if _tables(folder, "top_ranked"):
        logging.getLogger("pyqemb").warning("%s: top_ranked is not used: the whole corpus is ranked", folder)
    judged = {key: queries[key] for key in qrels}
    instructions = {key: text for key, text in instructions.items() if key in judged}
    return Beir(corpus, judged, instructions, qrels, files, empty_documents, empty_queries)


def read_documents(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of all files of the corpus."""
    return ((key, text) for _, key, text, _ in _texts(folder, "corpus", None, {}))


def read_pairs(folder: Path, split: str | None, allow_empty: bool = False) -> Iterator[tuple[str, str, str]]:
    """Yield (place, query, document) of each judgment above 0; `split` None: train, or the only one.

    Raises DataError as in `read_beir`, and for an empty judged query or document, unless `allow_empty`.
    """
    found = _judgement_files(folder)
    if split is None and not any(canonical(name) == "train" for name in found) and len(found) != 1:
        names = ", ".join(path.name for files in found.values() for path in files) or "none"
        raise DataError(f"{folder}: needs qrels/train.tsv or one single qrels/*.tsv; found {names}")
    beir = read_beir(folder, choose(folder, found, split))
    for query, judged in beir.qrels.items():
        for document, grade in judged.items():
            if grade > 0 and document in beir.corpus:
                for key, empty, name in (
                    (query, beir.empty_queries, "query"),
                    (document, beir.empty_documents, "document"),
                ):
                    if key in empty and not allow_empty:
                        raise DataError(f"{empty[key]}: the {name} {key!r} is judged and has an empty text")
                yield str(beir.files[0]), beir.queries[query], beir.corpus[document]


def document_text(row: Row, where: str) -> str:
    """Title and text of a document, joined as in mteb."""
    title = row.get("title")
    if title is not None and not isinstance(title, str):
        raise DataError(f"{where}: 'title' must be text, got {title!r}")
    return f"{title or ''} {_text(row, 'text', where)}".strip()


def document_id(row: Row, where: str) -> str | None:
    """The `_id` or `id` of a row, if it has one."""
    return None if row.get("_id", row.get("id")) is None else _identifier(row, where)


def _texts(folder: Path, name: str, split: str | None, empty: dict[str, str]) -> Iterator[tuple[str, str, str, Row]]:
    """Yield (place, id, text, row) of the corpus or the queries."""
    files = _tables(folder, name)
    if not files:
        raise DataError(f"{folder}: needs {name}.jsonl, or {name}/ with Parquet files")
    places: dict[str, str] = {}
    for where, row in _rows(folder, files, split):
        key, text = _identifier(row, where), document_text(row, where)
        if key in places:
            raise DataError(f"{where}: the id {key!r} occurs twice; it is that of {places[key]} too")
        places[key] = where
        if is_blank(text):
            empty[key] = where
        yield where, key, text, row
    if not places:
        raise DataError(f"{files[0]}: empty")


def _rows(folder: Path, files: list[Path], split: str | None) -> Iterator[tuple[str, Row]]:
    """Yield the rows of the files; if the file names contain splits, only those of `split`."""
    by_split: dict[str | None, list[Path]] = {}
    for path in files:
        name = split_of(path.relative_to(folder), shards=True)
        by_split.setdefault(None if name is None else canonical(name), []).append(path)
    chosen = files if len(by_split) < 2 or split is None else by_split.get(canonical(split))
    if chosen is None:
        found = ", ".join(sorted(str(name) for name in by_split))
        raise DataError(f"{files[0].parent}: has no files of split {split!r}; splits found: {found}")
    for path in chosen:
        yield from read_rows(path)


def _tables(folder: Path, name: str) -> list[Path]:
    """NAME.jsonl (or another format), or the files in the folder NAME."""
    if not folder.is_dir():
        return []
    files = [
        path for path in sorted(folder.iterdir())
        if path.name.startswith(name + ".") and format_of(path) in FORMATS and path.is_file()
        and path.name.split(".")[0] == name
    ]  # fmt: skip
    parts = data_files(folder / name) if (folder / name).is_dir() else []
    if len(files) + bool(parts) > 1:
        raise DataError(f"{(parts or files[1:])[0]}: exists beside {files[0].name}; keep one of them")
    return parts or files


def _judgement_files(folder: Path) -> dict[str, list[Path]]:
    """The files by split. mteb's repositories hold the same judgments as .tsv and as .jsonl; all files are read."""
    place = next((folder / name for name in _QRELS if (folder / name).is_dir()), None)
    found: dict[str, list[Path]] = {}
    if place is None:
        return found
    for path in sorted(place.rglob("*")):
        if path.is_file() and not path.name.startswith(".") and format_of(path) in (*FORMATS, *_TABLES):
            relative, stem = path.relative_to(place), path.name.split(".")[0]
            inside = len(relative.parts) > 1 or "-of-" in stem  # test/0000.parquet, test-00000-of-00001.parquet
            found.setdefault((inside and split_of(relative, shards=True)) or stem, []).append(path)
    return found


def _qrels(files: list[Path], queries: dict[str, str], corpus: dict[str, str]) -> dict[str, dict[str, float]]:
    qrels: dict[str, dict[str, float]] = {}
    absent: dict[str, list[str]] = {"queries": [], "documents": []}
    changed: list[str] = []
    positives = known = 0
    for where, query, document, grade in _judgements(files, lambda name: name in queries or name in corpus):
        if query not in queries:
            absent["queries"].append(f"{where}: query {query!r} is not in queries")
            continue
        if document not in corpus:
            absent["documents"].append(f"{where}: document {document!r} is not in corpus")
        elif grade > 0:
            known += 1
        positives += grade > 0
        own = qrels.setdefault(query, {})
        if own.setdefault(document, grade) != grade:
            changed.append(where)
            own[document] = grade
    lost = [place for places in absent.values() for place in places]
    if not known:
        if lost:
            raise DataError(f"{lost[0]}; no judgment above 0 is left")
        raise DataError(f"{files[0]}: no judgment above 0")
    log = logging.getLogger("pyqemb")
    for name, places in absent.items():
        if places:
            what = "they are left out" if name == "queries" else "they count as never found"
            log.warning(
                "%s: %s judged %s are absent (first: %s); %s", files[0], f"{len(places):,}", name, places[0], what
            )
    if changed:
        log.warning(
            "%s: %s pairs are judged twice with different grades (first: %s); the last grade counts",
            files[0], f"{len(changed):,}", changed[0],
        )  # fmt: skip
    return qrels


def _judgements(files: list[Path], is_id: Callable[[str], bool]) -> Iterator[tuple[str, str, str, float]]:
    """Yield (place, query id, document id, grade). A first line with an id, according to `is_id`, is not a header."""
    for path in files:
        if format_of(path) in _TABLES:
            yield from _judgement_table(path, is_id)
            continue
        for where, row in read_rows(path):
            query, document = (_identifier(row, where, key) for key in _COLUMNS[:2])
            yield where, query, document, _grade(row.get("score"), where)


def _judgement_table(path: Path, is_id: Callable[[str], bool]) -> Iterator[tuple[str, str, str, float]]:
    """Yield the judgments of a file without named columns, as `_judgements` does.

    A line holds query, document and grade separated by tabs, quoted as in CSV, with or without a header; or, as in
    TREC, query, iteration, document and grade separated by spaces or tabs.
    """
    order = (0, 1, 2)
    first = True
    for number, line in read_text(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            fields = next(csv.reader([line], delimiter="\t", strict=True))
        except csv.Error as error:
            raise DataError(f"{where}:1: not TSV: {error}") from error
        if len(fields) != 3 and len(words := line.split()) == 4:
            fields = [words[0], words[2], words[3]]
        elif first and set(_COLUMNS) <= set(fields):
            order = tuple(map(fields.index, _COLUMNS))  # type: ignore[assignment]
        header, first = first and number_of(fields[-1]) is None and not any(map(is_id, fields)), False
        if header:
            continue
        if len(fields) != max(3, *(1 + place for place in order)) or number_of(fields[order[2]]) is None:
            raise DataError(
                f"{where}:1: expected query-id, corpus-id, score with tabs between, or TREC's query, iteration, "
                "document, grade; "
                f"got {line[:80]!r}"
            )
        query, document, grade = (fields[place] for place in order)
        yield where, query, document, _grade(number_of(grade), where)


def _grade(value: Any, where: str) -> float:
    if isinstance(value, str):
        value = number_of(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise DataError(f"{where}: the grade 'score' must be a finite number, got {value!r}")
    return float(value)


def _text(row: Row, key: str, where: str) -> str:
    value = row.get(key)
    if value is None and key in row and format_of(where.rpartition(":")[0]) in (".csv", ".tsv"):
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be text, got {value!r}")
    return value


def _identifier(row: Row, where: str, key: str = "_id") -> str:
    value = row.get("_id", row.get("id")) if key == "_id" else row.get(key)
    if not isinstance(value, (str, int)) or isinstance(value, bool) or value == "":
        raise DataError(f"{where}: {key!r} must be text or an integer, got {value!r}")
    return str(value)
