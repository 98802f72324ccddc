"""Steps that rank the positive of a query among the documents of a pool."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from pyqemb import ops
from pyqemb.curation.ledger import Ledger
from pyqemb.curation.mining import embed_documents, embed_queries
from pyqemb.curation.spool import Spool, text_hash, windows, work_folder
from pyqemb.curation.steps import WINDOW, Instruction, Step, encoder, model_field
from pyqemb.data.example import Example, read_examples
from pyqemb.data.machine import reading


class _Ranked(Step):
    """Ranks positives in a pool of documents.

    The pool holds all positives and those of the files `pool`. Equal texts are one document. It has at most `pool_size`
    documents, which are chosen deterministically.
    """

    model: Any = model_field("Embedding model that ranks.")
    pool: list[Path] = Field(
        [], description="Files whose documents join the positives in the pool.", examples=[["corpus.jsonl"]]
    )
    pool_size: int = Field(1_000_000, ge=1, description="Maximum number of documents in the pool.", examples=[100_000])
    instruction: Instruction = None

    def _bounds(self) -> tuple[int, int]:
        raise NotImplementedError

    def _reason(self, rank: int) -> str:
        raise NotImplementedError

    def run(self, examples: Iterable[Example], ledger: Ledger) -> Iterator[Example]:
        others = chain.from_iterable((example.positive for example in read_examples(path)) for path in self.pool)
        yield from self.judge(examples, ledger, others)

    def judge(self, examples: Iterable[Example], ledger: Ledger, others: Iterable[str]) -> Iterator[Example]:
        """`run` with the given further documents of the pool."""
        low, high = self._bounds()
        for example, rank in self._ranks(examples, ledger.work, others, high):
            reason = None if low <= rank <= high else self._reason(rank)
            # Ranks above `high` are not known exactly.
            if ledger.judge(example, reason, **({"rank": rank} if rank <= high else {})):
                yield example

    def _ranks(
        self, examples: Iterable[Example], inside: Path | None, others: Iterable[str], depth: int
    ) -> Iterator[tuple[Example, int]]:
        """Each example with 1 + the number of documents of the pool that score above its positive, at most depth + 1.

        Equal texts are one document.
        """
        model = encoder(self.model)
        with work_folder(inside) as folder:
            spool = Spool(folder)
            own = np.array([text_hash(e.positive) for e in spool.fill(examples)], dtype=np.uint64)
            if not len(spool):
                return
            further = _Texts(folder / "pool.txt", others)
            chosen = np.unique(np.concatenate([own, further.hashes]))[: self.pool_size]  # like a sample
            hashes, vectors = _embed(model, chain((e.positive for e in spool), further), chosen, folder / "vectors.f32")
            pool = torch.from_numpy(vectors)
            order = np.argsort(hashes)
            for window in windows(spool, WINDOW):
                rows, vectors = embed_queries(model, window, self.instruction)
                queries = np.ascontiguousarray(vectors[rows])
                positives = [example.positive for example in window]
                texts = {text: row for row, text in enumerate(dict.fromkeys(positives))}
                scores = (queries * embed_documents(model, list(texts))[[texts[text] for text in positives]]).sum(
                    axis=1
                )
                found, _ = ops.top_k(
                    torch.from_numpy(queries), pool, min(depth, len(pool)),
                    exclude=torch.from_numpy(_places(positives, hashes, order)[:, None]),
                )  # fmt: skip
                # Slightly above the score, because equal scores may differ in rounding.
                beaten = found.numpy() > scores[:, None] + 1e-6
                yield from zip(window, (1 + beaten.sum(axis=1)).tolist(), strict=True)


class Consistency(_Ranked):
    """Keep a pair if its positive is among the `top` documents nearest to its query.

    The pool of documents holds all positives and those of the files `pool`.

    Source: the consistency filter of E5 (arXiv 2212.03533), section 3.
    """

    kind: Literal["consistency"] = "consistency"
    top: int = Field(20, ge=1, description="Lowest rank of the positive at which the pair is kept.", examples=[20])

    def _bounds(self) -> tuple[int, int]:
        return 1, self.top

    def _reason(self, rank: int) -> str:
        return f"the positive is not among the {self.top} nearest documents"


class Rank(_Ranked):
    """Keep a pair if the rank of its positive lies in a window.

    Rank 1 is the document nearest to the query. A pair below `min_rank` is too easy, one above `max_rank` probably
    wrong.
    """

    kind: Literal["rank"] = "rank"
    min_rank: int = Field(1, ge=1, description="First rank of the window; 1 is the nearest document.", examples=[2])
    max_rank: int = Field(100, ge=1, description="Last rank of the window.", examples=[100])

    @model_validator(mode="after")
    def _ordered(self) -> "Rank":
        if self.min_rank > self.max_rank:
            raise ValueError(f"min_rank must not be above max_rank, got {self.min_rank} and {self.max_rank}")
        return self

    def _bounds(self) -> tuple[int, int]:
        return self.min_rank, self.max_rank

    def _reason(self, rank: int) -> str:
        return f"rank below {self.min_rank}" if rank < self.min_rank else f"rank above {self.max_rank}"


class _Texts:
    """Texts on disk, one per line with escaped line ends, and their hashes."""

    def __init__(self, path: Path, texts: Iterable[str]):
        self._path, found = path, []
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for text in texts:
                found.append(text_hash(text))
                file.write(text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r") + "\n")
        self.hashes = np.array(found, dtype=np.uint64)

    def __iter__(self) -> Iterator[str]:
        with self._path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                yield line[:-1].replace("\\r", "\r").replace("\\n", "\n").replace("\\\\", "\\")


def _embed(model: Any, texts: Iterable[str], wanted: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(hashes [P], vectors [P, E] mapped from the disk) of the distinct texts whose hashes are in `wanted` (sorted)."""
    there = np.zeros(len(wanted), dtype=bool)
    hashes: list[int] = []
    with path.open("wb") as file:

        def write(batch: list[str]) -> int:
            vectors = embed_documents(model, batch)
            file.write(vectors.tobytes())
            return vectors.shape[1]

        batch: list[str] = []
        dim = 0
        for text in texts:
            value = text_hash(text)
            at = int(np.searchsorted(wanted, np.uint64(value)))
            if at == len(wanted) or wanted[at] != value or there[at]:
                continue
            there[at] = True
            hashes.append(value)
            batch.append(text)
            if len(batch) == WINDOW:
                dim, batch = write(batch), []
        if batch:
            dim = write(batch)
    with reading(path):
        vectors = np.memmap(path, dtype=np.float32, mode="r+", shape=(len(hashes), dim))
    return np.array(hashes, dtype=np.uint64), vectors


def _places(texts: Iterable[str], hashes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """int64 [N]: the index of each text in the pool, or -1. `order` sorts `hashes`."""
    wanted = np.array([text_hash(text) for text in texts], dtype=np.uint64)
    at = np.searchsorted(hashes[order], wanted).clip(max=len(hashes) - 1)
    return np.where(hashes[order[at]] == wanted, order[at], -1)
