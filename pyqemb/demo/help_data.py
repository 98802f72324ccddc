"""The data that ships with pyqemb: paragraphs of the LibreOffice help with their human translations, split by page.

Training uses only the pages of train.jsonl.xz; questions come from the pages of dev.jsonl.xz. The few texts that are in
both are excluded from training too.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

from pyqemb.data.example import Example, read_lines
from pyqemb.demo.material import Document, Material, Question, halves, neighbours, sample, untouched

LANGUAGES = ("de", "fr", "ja", "zh")
TITLES = "title"
_FOLDER = Path(__file__).parent / "data" / "help"
_WEAK_PAIRS = 25_000  # of each of the four kinds, about 100,000 in total
_DOCUMENT = "en"

Row = dict[str, Any]


def help_material(*, seed: int = 0, pages: int | None = None) -> Material:
    """The help texts as Material. `pages` keeps only that many training pages (and a third as many held-out ones)."""
    train, dev = load_rows("train"), load_rows("dev")
    if pages is not None:
        train, dev = _first_pages(train, pages), _first_pages(dev, max(pages // 3, 1))
    held_out = _texts(dev)
    weak, supervised = weak_pairs(train, seed=seed), supervised_pairs(train)
    kept = untouched(weak, held_out), untouched(supervised, held_out)
    return Material(
        name="help",
        texts=[text for text in _texts(train) if text not in held_out],
        weak=kept[0],
        supervised=kept[1],
        questions=questions(train, dev),
        corpora={"held-out pages": _documents(dev), "all pages": _documents([*dev, *train])},
        groups=LANGUAGES,
        facts={**overlaps(train, dev), "weak pairs": len(kept[0]), "supervised pairs": len(kept[1])},
    )


def load_rows(split: str) -> list[Row]:
    """The paragraphs of `train` or `dev`: page, title (may be empty), en, and those of de, fr, ja, zh that exist."""
    return [row for _, row in read_lines(_FOLDER / f"{split}.jsonl.xz")]


def weak_pairs(rows: Sequence[Row], *, seed: int) -> list[Example]:
    """Return pairs that need no label.

    They are title -> paragraph, half -> half, and neighboring paragraphs of a page, in one language and across two.

    Each batch holds one task, and each task has one language per side. With mixed languages, the language alone would
    distinguish most negatives from the positive, and the model would learn languages instead of meaning
    (docs/dev/log.md).
    """
    languages, pages = (_DOCUMENT, *LANGUAGES), _by_page(rows)
    titles = [
        Example(row["title"], row[key], task=f"title-{key}")
        for row in rows
        if row["title"]
        for key in languages
        if key in row
    ]
    split: list[Example] = []
    together: list[Example] = []
    for key in languages:
        split += halves((row[key] for row in rows if key in row), task=f"half-{key}")
        together += neighbours(
            ([row[key] for row in page if key in row] for page in pages), seed=seed, task=f"page-{key}"
        )
    across = list(_neighbours_across(pages, languages, seed))
    return [pair for kind in (titles, split, together, across) for pair in sample(kind, _WEAK_PAIRS, seed=seed)]


def _neighbours_across(pages: Iterable[Sequence[Row]], languages: Sequence[str], seed: int) -> Iterator[Example]:
    """Pair a paragraph in one language with another paragraph of its page in a second language.

    A paragraph is never paired with its own translation.
    """
    rng = random.Random(seed)
    for page in pages:
        for one, other in permutations(languages, 2):
            order = list(page)
            rng.shuffle(order)
            for left, right in pairwise(order):
                if one in left and other in right:
                    yield Example(left[one], right[other], task=f"page-{one}-{other}")


def supervised_pairs(rows: Sequence[Row]) -> list[Example]:
    """Human-made pairs: a translation with its English paragraph, and a title with the paragraphs of its page."""
    translations = [
        Example(row[key], row[_DOCUMENT], task="translation") for row in rows for key in LANGUAGES if key in row
    ]
    titles = [Example(row["title"], row[_DOCUMENT], task=TITLES) for row in rows if row["title"]]
    return translations + titles


def questions(train: Sequence[Row], dev: Sequence[Row]) -> list[Question]:
    """Held-out translations and titles as questions.

    Paragraphs with an equal text or translation count as answers too.
    """
    asked = [(key, row[key]) for row in dev for key in LANGUAGES if key in row]
    asked += [(TITLES, row["title"]) for row in dev if row["title"]]
    answers: dict[tuple[str, str], set[str]] = {pair: set() for pair in asked}
    for row in (*dev, *train):
        for group in (*LANGUAGES, TITLES):
            pair = (group, row.get(group))
            if pair in answers:
                answers[pair].add(row[_DOCUMENT])
    return [Question(group, text, frozenset(found)) for (group, text), found in answers.items()]


def overlaps(train: Sequence[Row], dev: Sequence[Row]) -> dict[str, int]:
    """Counts of the two sides and their overlap: no pages, but some texts that the help repeats."""
    train_texts, dev_texts = _texts(train), _texts(dev)
    return {
        "training pages": len(_by_page(train)),
        "training paragraphs": len(train),
        "held-out pages": len(_by_page(dev)),
        "held-out paragraphs": len(dev),
        "pages on both sides": len({row["page"] for row in train} & {row["page"] for row in dev}),
        "held-out English paragraphs that training pages repeat": sum(row[_DOCUMENT] in train_texts for row in dev),
        "texts on both sides, left out of training": len(train_texts.keys() & dev_texts.keys()),
    }


def _documents(rows: Iterable[Row]) -> list[Document]:
    return [Document(row[_DOCUMENT], row["page"]) for row in rows]


def _by_page(rows: Iterable[Row]) -> list[list[Row]]:
    pages: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        pages[row["page"]].append(row)
    return list(pages.values())


def _first_pages(rows: Sequence[Row], count: int) -> list[Row]:
    kept = set(list(dict.fromkeys(row["page"] for row in rows))[:count])
    return [row for row in rows if row["page"] in kept]


def _texts(rows: Iterable[Row]) -> dict[str, None]:
    """The distinct texts of all columns, in order."""
    return dict.fromkeys(row[key] for row in rows for key in ("title", _DOCUMENT, *LANGUAGES) if row.get(key))
