"""A step that drops training examples that share text with evaluation data."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from pyqemb import ops
from pyqemb.curation.ledger import Ledger
from pyqemb.curation.mining import embed_documents, embed_queries
from pyqemb.curation.normalize import plain
from pyqemb.curation.spool import windows
from pyqemb.curation.steps import WINDOW, Step, encoder, model_field
from pyqemb.data import beir
from pyqemb.data.example import Example, read_examples
from pyqemb.data.rows import FORMATS, format_of
from pyqemb.data.splits import canonical
from pyqemb.errors import DataError


class Decontaminate(Step):
    """Drop examples that share text with evaluation data.

    An example is dropped if its query or its positive shares `ngram` words in a row with an evaluation text, or all
    words of a shorter evaluation text. Accents, invisible characters and HTML entities are ignored.

    The evaluation texts are the queries and, unless `documents` is false, the documents judged relevant to them, of
    every split but train. With a `model`, an example is also dropped if its query has a similarity above
    `max_similarity` to an evaluation query, or its positive to a relevant document.
    """

    kind: Literal["decontaminate"] = "decontaminate"
    folders: list[Path] = Field(
        min_length=1,
        description="Evaluation data: retrieval, STS or bitext folders, or files of examples.",
        examples=[["mteb/scifact", "mteb/stsb"]],
    )
    ngram: int = Field(13, ge=1, description="Number of words in a row that count as shared text.", examples=[13])
    documents: bool = Field(
        True, description="Compare with the relevant documents too, not only with the queries.", examples=[False]
    )
    model: Any = model_field("Embedding model that finds near copies (default: none).", None)
    max_similarity: float = Field(
        0.95, ge=-1, le=1, description="Similarity by `model` above which an example is dropped.", examples=[0.9]
    )

    def run(self, examples: Iterable[Example], ledger: Ledger) -> Iterator[Example]:
        """Yield the examples that share no text with the evaluation, in order."""
        queries, documents = self._texts()
        ledger.notes.update({"evaluation queries": len(queries), "evaluation documents": len(documents)})
        known = np.unique(ops.shingles([plain(text) for text in (*queries, *documents)], self.ngram)[0])
        near = None if self.model is None else self._vectors(queries, documents)
        for window in windows(examples, WINDOW):
            texts = [plain(text) for example in window for text in (example.query, example.positive)]
            shared = _any_known(*ops.shingles(texts, self.ngram), known).reshape(-1, 2)
            closest = np.full((len(window), 2), -1, dtype=np.float32) if near is None else self._closest(window, *near)
            for example, (query, positive), scores in zip(window, shared.tolist(), closest.tolist(), strict=True):
                reason = None
                if query or positive:
                    side = "query" if query else "positive"
                    reason = f"{side} shares {self.ngram} words, or all, with the evaluation"
                elif near is not None and max(scores) > self.max_similarity:
                    side = "query" if scores[0] > self.max_similarity else "positive"
                    reason = f"{side} is nearly one of the evaluation"
                if ledger.judge(example, reason, **({} if near is None else {"nearest_similarity": max(scores)})):
                    yield example

    def _texts(self) -> tuple[list[str], list[str]]:
        queries: dict[str, None] = {}
        documents: dict[str, None] = {}
        for folder in self.folders:
            for example in evaluation_examples(folder):
                queries[example.query] = None
                if self.documents and example.positive:
                    documents[example.positive] = None
        return list(queries), list(documents)

    def _vectors(self, queries: list[str], documents: list[str]) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
        model = encoder(self.model)
        asked = torch.from_numpy(embed_queries(model, [Example(query, "") for query in queries], None)[1])
        return model, asked, torch.from_numpy(embed_documents(model, documents)) if documents else None

    def _closest(
        self, window: list[Example], model: Any, queries: torch.Tensor, documents: torch.Tensor | None
    ) -> np.ndarray:
        """float32 [N, 2]: the highest score of each query and each positive against the evaluation texts."""
        bare = [Example(example.query, "") for example in window]  # like evaluation queries
        rows, vectors = embed_queries(model, bare, None)
        best = [ops.top_k(torch.from_numpy(vectors), queries, 1)[0][rows, 0]]
        if documents is None:
            best.append(torch.full_like(best[0], -1))
        else:
            own = torch.from_numpy(embed_documents(model, [example.positive for example in window]))
            best.append(ops.top_k(own, documents, 1)[0][:, 0])
        return torch.stack(best, dim=1).numpy()


def evaluation_examples(path: Path) -> Iterator[Example]:
    """The pairs that an evaluation folder judges: queries with relevant documents, or both sentences."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_file():
        yield from read_examples(path)
        return
    for name in ("sts", "bitext"):
        if pairs := [file for file in sorted(path.glob(f"{name}.*")) if format_of(file) in FORMATS]:
            yield from read_examples(pairs[0])
            return
    splits = beir.splits(path)
    if not splits:
        raise DataError(f"{path}: expected qrels/*.tsv (retrieval), sts.jsonl or bitext.jsonl, found none of them")
    for split in [split for split in splits if canonical(split) != "train"] or splits:
        found = beir.read_beir(path, split)
        for query, judged in found.qrels.items():
            positives = [document for document, grade in judged.items() if grade > 0]
            # Queries whose documents are missing still count.
            for text in [found.corpus[key] for key in positives if key in found.corpus] or [""]:
                yield Example(found.queries[query], text)


def _any_known(hashes: np.ndarray, counts: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Whether any hash of each text is known: bool [N]."""
    if not len(known) or not len(hashes):
        return np.zeros(len(counts), dtype=bool)
    found = known[np.searchsorted(known, hashes).clip(max=len(known) - 1)] == hashes
    return np.bincount(np.repeat(np.arange(len(counts)), counts), weights=found, minlength=len(counts)) > 0
