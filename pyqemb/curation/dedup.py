"""Deduplication steps: equal texts, and near copies by MinHash."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from pyqemb import ops
from pyqemb.curation.ledger import Ledger
from pyqemb.curation.spool import Seen, Spool, text_hash, windows, work_folder
from pyqemb.curation.steps import WINDOW, Step
from pyqemb.data.example import Example
from pyqemb.data.machine import reading

On = Annotated[
    Literal["pair", "query", "positive"],
    Field(description="Text that is compared: `pair`, `query` or `positive`.", examples=["positive"]),
]
_WHOLE = 1 << 40  # words per n-gram, so that every text is one n-gram


class Exact(Step):
    """Keep the first of several examples with the same words.

    Case, spaces and punctuation are ignored. The step takes 8 bytes of memory per example.
    """

    kind: Literal["exact"] = "exact"
    on: On = "pair"

    def run(self, examples: Iterable[Example], ledger: Ledger) -> Iterator[Example]:
        """Yield the first example of each group of equal texts, in order."""
        seen = Seen()
        for window in windows(examples, WINDOW):
            new = seen.add(_keys(window, self.on))
            for example, first in zip(window, new.tolist(), strict=True):
                if ledger.judge(example, None if first else f"{self.on} there already"):
                    yield example


class Near(Step):
    """Keep the first of each cluster of near copies.

    Two texts are near copies if the Jaccard similarity of their sets of word n-grams is at least `threshold`. MinHash
    signatures estimate it with an error of 0.5 / sqrt(num_hashes); candidate pairs come from bands of the signatures
    (LSH). The step takes 4 * num_hashes bytes per example on disk and about 40 bytes in memory.

    Source: Broder (1997); bands: Leskovec et al., Mining of Massive Datasets, section 3.4.
    """

    kind: Literal["near"] = "near"
    on: On = "pair"
    threshold: float = Field(
        0.8, gt=0, le=1, description="Jaccard similarity from which two texts are near copies.", examples=[0.9]
    )
    ngram: int = Field(5, ge=1, description="Words per n-gram.", examples=[5])
    num_hashes: int = Field(
        128, ge=16, description="Hash functions of a MinHash signature. More are more exact and slower.", examples=[256]
    )

    def run(self, examples: Iterable[Example], ledger: Ledger) -> Iterator[Example]:
        """Yield the first example of each cluster of similar texts, in order."""
        rows = rows_of_band(self.num_hashes, self.threshold)
        ledger.notes.update({"bands": self.num_hashes // rows, "rows of a band": rows})
        with work_folder(ledger.work) as folder:
            spool, path = Spool(folder), folder / "signatures.u32"
            with path.open("wb") as file:
                for window in windows(spool.fill(examples), WINDOW):
                    file.write(ops.min_hash(_texts(window, self.on), self.num_hashes, self.ngram).tobytes())
            if not len(spool):
                return
            leader = clusters(path, len(spool), self.num_hashes, rows, self.threshold)
            for index, example in enumerate(spool):
                if ledger.judge(example, None if leader[index] == index else f"{self.on} nearly there already"):
                    yield example


def rows_of_band(num_hashes: int, threshold: float) -> int:
    """The longest bands that find two texts of exactly that similarity with a probability of at least 0.95."""
    fitting = [r for r in range(1, num_hashes + 1) if 1 - (1 - threshold**r) ** (num_hashes // r) >= 0.95]
    return max(fitting, default=1)


def clusters(signatures: Path, count: int, num_hashes: int, rows: int, threshold: float) -> np.ndarray:
    """int64 [count]: the first text of each text's cluster. `signatures`: a file of uint32 [count, num_hashes]."""
    with reading(signatures):
        mapped = np.memmap(signatures, dtype=np.uint32, mode="r", shape=(count, num_hashes))
    leader = np.arange(count)
    empty = _banded(mapped, 0, num_hashes) == _polynomial(np.full((1, num_hashes), 0xFFFFFFFF, dtype=np.uint32))
    for start in range(0, num_hashes - rows + 1, rows):
        keys = _banded(mapped, start, start + rows)
        order = np.argsort(keys, kind="stable")
        same = keys[order[1:]] == keys[order[:-1]]
        # Each text is compared with the first of its bucket only; the texts of a bucket are similar, except by chance.
        heads = np.maximum.accumulate(np.where(np.concatenate([[True], ~same]), np.arange(count), 0))
        later = np.flatnonzero(np.concatenate([[False], same]))
        first, second = order[heads[later]], order[later]
        wanted = ~(empty[second] | (_find(leader, first) == _find(leader, second)))
        first, second = first[wanted], second[wanted]
        for part in range(0, len(first), WINDOW):
            a, b = first[part : part + WINDOW], second[part : part + WINDOW]
            alike = (mapped[a] == mapped[b]).mean(axis=1) >= threshold
            for x, y in zip(a[alike].tolist(), b[alike].tolist(), strict=True):
                _join(leader, x, y)
    return _find(leader, np.arange(count))


def _texts(window: list[Example], on: On) -> list[str]:
    return [f"{e.query}\n{e.positive}" if on == "pair" else getattr(e, on) for e in window]


def _keys(window: list[Example], on: On) -> np.ndarray:
    """uint64 [N]: a hash of the words of each text. Texts without words are hashed by their characters."""
    sides = ("query", "positive") if on == "pair" else (on,)
    keys = np.zeros(len(window), dtype=np.uint64)
    for side in sides:
        texts = [getattr(example, side) for example in window]
        hashes, counts = ops.shingles(texts, _WHOLE)
        bare = np.array(
            [text_hash(text.strip()) for text, count in zip(texts, counts, strict=True) if not count], dtype=np.uint64
        )
        own = np.empty(len(window), dtype=np.uint64)
        own[counts > 0], own[counts == 0] = hashes, bare
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + own
    return keys


def _banded(mapped: np.ndarray, start: int, end: int) -> np.ndarray:
    """uint64 [count]: a hash of the entries start..end of each signature."""
    keys = np.empty(len(mapped), dtype=np.uint64)
    for first in range(0, len(mapped), 1 << 16):
        keys[first : first + (1 << 16)] = _polynomial(mapped[first : first + (1 << 16), start:end])
    return keys


def _polynomial(values: np.ndarray) -> np.ndarray:
    key = np.zeros(len(values), dtype=np.uint64)
    for column in values.T:
        key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


def _find(leader: np.ndarray, of: np.ndarray) -> np.ndarray:
    found = leader[of]
    while not np.array_equal(further := leader[found], found):
        found = further
    return found


def _join(leader: np.ndarray, x: int, y: int) -> None:
    while leader[x] != x:
        x = int(leader[x])
    while leader[y] != y:
        y = int(leader[y])
    leader[max(x, y)] = min(x, y)
