"""Retrieval data of the quality benchmarks: pairs to train on, and a dev and a test task of pages that training never
sees.

Three sets come from the machine itself: the LibreOffice help that ships with pyqemb (`help`), functions of the
installed Python libraries (`code`), and the installed manual pages (`manpages`). The others are files FILE.jsonl.gz in
the folder `--data`, with `query`, `positive` and `group`.
"""

import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from manpages import descriptions

from pyqemb.data.example import Example, read_lines
from pyqemb.demo.help_data import LANGUAGES, load_rows
from pyqemb.demo.python_data import LIBRARIES, functions_of_library
from pyqemb.errors import DataError
from pyqemb.evaluation import Retrieval

LONGEST = 400  # characters of a text
TRAIN = 40_000  # pairs
DEV, TEST = (300, 1500), (1000, 3000)  # at most that many queries and documents
FILES = {
    "packages": "debian_en",
    "cross-lingual": "debian_xling",
    "wordnet": "wordnet_gloss2lemma",
}
Pair = tuple[str, str, str]  # query, positive, group: pairs of one group are never on both sides


@dataclass(frozen=True)
class Task:
    """Training pairs and two held-out retrieval tasks. No held-out text is in the training pairs."""

    name: str
    train: list[Example]
    dev: Retrieval
    test: Retrieval


def load(name: str, folder: Path | None) -> Task:
    """The task of that name; a DataError says what is not installed."""
    parts: dict[str, dict[tuple[str, str], None]] = {"train": {}, "dev": {}, "test": {}}
    for query, positive, group in _pairs(name, folder):
        if query.strip() and positive.strip():
            parts[part_of(group)][query.strip()[:LONGEST], positive.strip()[:LONGEST]] = None
    held_out = {text for part in ("dev", "test") for pair in parts[part] for text in pair}
    kept = [pair for pair in parts["train"] if not held_out.intersection(pair)]
    chosen = random.Random(0).sample(kept, min(TRAIN, len(kept)))
    return Task(
        name,
        [Example(*pair, task=name) for pair in chosen],
        retrieval(parts["dev"], *DEV),
        retrieval(parts["test"], *TEST),
    )


def names() -> list[str]:
    """All sets."""
    return [*_BUILT, *FILES]


def _pairs(name: str, folder: Path | None) -> Iterable[Pair]:
    if name in _BUILT:
        found = list(_BUILT[name]())
        if not found:
            raise DataError(f"{name}: nothing is installed that it could be built from")
        return found
    if name not in FILES:
        raise DataError(f"{name}: unknown set; the sets are {', '.join(names())}")
    path = Path(folder or "") / f"{FILES[name]}.jsonl.gz"
    if folder is None or not path.is_file():
        raise DataError(f"{name}: needs --data FOLDER with {path.name}")
    return ((row["query"], row["positive"], row["group"]) for _, row in read_lines(path))


def _help() -> Iterator[Pair]:
    for row in (*load_rows("train"), *load_rows("dev")):
        yield from ((row[key], row["en"], row["page"]) for key in LANGUAGES if key in row)


def _code() -> Iterator[Pair]:
    for library in LIBRARIES:
        yield from ((f.summary, f.source, f.file) for f in functions_of_library(library, 600))


_BUILT: dict[str, Callable[[], Iterable[Pair]]] = {"help": _help, "code": _code, "manpages": descriptions}


def part_of(group: str) -> str:
    """The side of a group: train, dev or test."""
    return {0: "test", 1: "dev"}.get(zlib.crc32(group.encode()) % 10, "train")


def retrieval(pairs: Iterable[tuple[str, str]], queries: int, documents: int) -> Retrieval:
    """The task whose corpus is the positives of the pairs; the queries are a sample."""
    answers: dict[str, set[str]] = {}
    for query, positive in pairs:
        answers.setdefault(query, set()).add(positive)
    rng = random.Random(0)
    asked = rng.sample(sorted(answers), min(queries, len(answers)))
    wanted = {text for query in asked for text in answers[query]}
    others = sorted({text for found in answers.values() for text in found} - wanted)
    corpus = sorted(wanted) + rng.sample(others, min(len(others), max(documents - len(wanted), 0)))
    ids = {text: f"d{i}" for i, text in enumerate(corpus)}
    return Retrieval(
        {f"q{i}": query for i, query in enumerate(asked)},
        {place: text for text, place in ids.items()},
        {f"q{i}": {ids[text]: 1.0 for text in answers[query]} for i, query in enumerate(asked)},
    )
