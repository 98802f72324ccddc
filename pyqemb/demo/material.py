"""Material: the data that the recipe needs, and weak pairs made from plain texts."""

import random
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pyqemb.data.example import Example

_BREAK = re.compile(r"[\s\u3001\u3002\uff0c\uff1b\uff1a]")  # white space and the marks that end a clause in CJK


@dataclass(frozen=True, slots=True)
class Document:
    """A text of the corpus, and its source (a page, a file)."""

    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out query of one group (a language, a library) and the texts that answer it."""

    group: str
    text: str
    answers: frozenset[str]


@dataclass(frozen=True)
class Material:
    """Training texts and pairs, held-out questions, and the corpora in which their answers are searched.

    `texts` are all training texts, which the tokenizer is trained on. `groups` are the groups in the mean; questions of
    other groups are reported separately. The first corpus is the one that models are compared on.
    """

    name: str
    texts: Sequence[str]
    weak: Sequence[Example]
    supervised: Sequence[Example]
    questions: Sequence[Question]
    corpora: dict[str, list[Document]]
    groups: Sequence[str]
    max_length: int = 128
    facts: dict[str, int] = field(default_factory=dict)


def untouched(examples: Iterable[Example], held_out: Collection[str]) -> list[Example]:
    """The distinct examples without a text of the held-out side."""
    return [
        example
        for example in dict.fromkeys(examples)
        if not any(text in held_out for text in (example.query, example.positive, *example.negatives))
    ]


def halves(texts: Iterable[str], *, task: str = "half", at_least: int = 24) -> Iterator[Example]:
    """Pairs of the first and the second half of each text, without texts of fewer than `at_least` characters."""
    for text in texts:
        if len(text) < at_least:
            continue
        cut = _cut(text)
        left, right = text[:cut].strip(), text[cut:].strip()
        if left and right and left != right:
            yield Example(left, right, task=task)


def neighbours(groups: Iterable[Sequence[str]], *, seed: int, task: str = "neighbour") -> Iterator[Example]:
    """Pairs of texts of the same page or file: each text with one other."""
    rng = random.Random(seed)
    for group in groups:
        chain = list(dict.fromkeys(group))
        rng.shuffle(chain)
        for left, right in zip(chain, chain[1:], strict=False):
            yield Example(left, right, task=task)


def sample(items: Sequence[Example], count: int, *, seed: int) -> list[Example]:
    """At most `count` of the items, in order."""
    if len(items) <= count:
        return list(items)
    chosen = sorted(random.Random(seed).sample(range(len(items)), count))
    return [items[index] for index in chosen]


def _cut(text: str) -> int:
    """Where to split a text: at the break nearest to its middle, or in the middle if no break is near (Chinese)."""
    middle = len(text) // 2
    near = [match.end() for match in _BREAK.finditer(text) if abs(match.end() - middle) <= max(8, len(text) // 4)]
    return min(near, key=lambda end: abs(end - middle), default=middle)
