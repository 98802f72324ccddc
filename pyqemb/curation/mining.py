"""Hard negatives: documents that a model ranks high for a query, and that are not its positives in disguise."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from pyqemb import ops
from pyqemb.data.example import Example
from pyqemb.errors import ConfigError, DataError
from pyqemb.model.device import search_device

_TILE = 8192  # queries searched at a time


@dataclass(frozen=True)
class MiningReport:
    """Means are over the rows that got a negative; `short` counts the rows that got fewer than k."""

    rows: int
    documents: int
    short: int
    positive_score: float
    negative_score: float


@dataclass(frozen=True)
class Mined:
    """The examples in their order, each with its negatives, hardest first."""

    examples: list[Example]
    report: MiningReport


def mine(
    model: Any,
    examples: Iterable[Example],
    *,
    corpus: Iterable[str] | None = None,
    k: int = 7,
    max_positive_ratio: float | None = 0.95,
    margin: float | None = None,
    max_score: float | None = None,
    mean_margin: float | None = None,
    skip_top: int = 0,
    depth: int = 100,
    sampling: Literal["top", "random", "softmax"] = "top",
    sampling_temperature: float = 0.05,
    seed: int = 0,
    instruction: str | None = None,
) -> Mined:
    """Give every example up to k hard negatives, in place of those it has.

    Args:
        model: an Embedder, or anything with its encode_query and encode_document.
        examples: queries with their positives. All positives of one query text are spared, by text.
        corpus: further documents to choose from; the positives always belong to the pool.
        max_positive_ratio: a negative scores at most this share of the positive (TopK-PercPos; below a negative positive
            score by the same share of its size). None: no such limit.
        margin: a negative scores at most the positive's score minus this.
        max_score: a negative scores at most this.
        mean_margin: a negative scores at most the mean of the query's positives plus this (Qwen3-VL-Embedding, 3.3).
        skip_top: leave out so many of the best that qualify.
        depth: how many that qualify are looked at.
        sampling: the best k of them, or k drawn by `seed`: all alike, or in proportion to exp(score / sampling_temperature).
        instruction: for examples that bring none.

    Raises:
        ConfigError: an argument is out of range. DataError: no examples, or vectors that are not finite.

    Source: NV-Retriever (arXiv 2407.15831), section 3; Qwen3-VL-Embedding (arXiv 2601.04720), section 3.3.
    """
    examples = list(examples)
    _check(examples, k, max_positive_ratio, depth, skip_top, sampling, sampling_temperature)
    documents = list(dict.fromkeys([*(e.positive for e in examples), *(corpus or ())]))
    place = {text: index for index, text in enumerate(documents)}
    query_rows, query_vectors = embed_queries(model, examples, instruction)
    vectors = embed_documents(model, documents)
    positives = np.array([place[e.positive] for e in examples])
    positive_scores = (query_vectors[query_rows] * vectors[positives]).sum(axis=1)

    spared = _positives_of_each_text(examples, place)
    ceilings = _ceilings(positive_scores, max_positive_ratio, margin, max_score)
    if mean_margin is not None:
        means = _mean_scores(query_vectors, query_rows, vectors, spared)
        ceilings = np.minimum(ceilings, means + np.float32(mean_margin))
    pool = torch.from_numpy(vectors).to(search_device(model))
    chosen, scores = [], []
    generator = np.random.default_rng(seed)
    for start in range(0, len(examples), _TILE):
        rows = slice(start, start + _TILE)
        found, found_scores = _search(
            query_vectors[query_rows[rows]],
            pool,
            spared[rows],
            ceilings[rows],
            min(depth + skip_top, len(documents)),
        )
        for indices, values in zip(found, found_scores, strict=True):
            valid = np.flatnonzero(indices >= 0)[skip_top:]
            if sampling != "top" and len(valid) > k:
                # Gumbel noise on the logarithms of the weights: the k largest are a draw without replacement.
                logits = values[valid] / sampling_temperature if sampling == "softmax" else 0.0
                valid = np.sort(valid[np.argsort(-(logits + generator.gumbel(size=len(valid))))[:k]])
            chosen.append(indices[valid[:k]])
            scores.append(values[valid[:k]])
    mined = [
        replace(example, negatives=tuple(documents[i] for i in indices))
        for example, indices in zip(examples, chosen, strict=True)
    ]
    some = [i for i, values in enumerate(scores) if len(values)]
    report = MiningReport(
        rows=len(mined),
        documents=len(documents),
        short=sum(len(values) < k for values in scores),
        positive_score=float(positive_scores[some].mean()) if some else float("nan"),
        negative_score=float(np.mean([scores[i].mean() for i in some])) if some else float("nan"),
    )
    return Mined(mined, report)


def embed_queries(model: Any, examples: Sequence[Example], instruction: str | None) -> tuple[np.ndarray, np.ndarray]:
    """(row of each example [N], unit vectors of the distinct queries [Q, E]); an example's own instruction wins."""
    asked = [(example.query, example.instruction or instruction) for example in examples]
    distinct = {pair: row for row, pair in enumerate(dict.fromkeys(asked))}
    vectors: np.ndarray | None = None
    for told in dict.fromkeys(told for _, told in distinct):
        rows = [row for (_, its), row in distinct.items() if its == told]
        encoded = _finite("queries", model.encode_query([q for q, its in distinct if its == told], instruction=told))
        vectors = np.empty((len(distinct), encoded.shape[1]), dtype=np.float32) if vectors is None else vectors
        vectors[rows] = encoded
    assert vectors is not None
    return np.array([distinct[pair] for pair in asked]), vectors


def embed_documents(model: Any, documents: Sequence[str]) -> np.ndarray:
    """Unit vectors [M, E] float32."""
    return _finite("documents", model.encode_document(list(documents)))


def _ceilings(positive: np.ndarray, ratio: float | None, margin: float | None, max_score: float | None) -> np.ndarray:
    ceilings = np.full(len(positive), np.inf, dtype=np.float32)
    if ratio is not None:
        ceilings = np.minimum(ceilings, positive - (1 - ratio) * np.abs(positive))
    if margin is not None:
        ceilings = np.minimum(ceilings, positive - margin)
    if max_score is not None:
        ceilings = np.minimum(ceilings, max_score)
    return ceilings.astype(np.float32)


def _positives_of_each_text(examples: Sequence[Example], place: dict[str, int]) -> np.ndarray:
    """int64 [N, most]: every document that is a positive of the example's query text, filled with -1."""
    by_query: dict[str, dict[int, None]] = {}
    for example in examples:
        by_query.setdefault(example.query, {})[place[example.positive]] = None
    spared = np.full((len(examples), max(map(len, by_query.values()))), -1, dtype=np.int64)
    for row, example in enumerate(examples):
        own = list(by_query[example.query])
        spared[row, : len(own)] = own
    return spared


def _mean_scores(queries: np.ndarray, rows: np.ndarray, documents: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """float32 [N]: the mean score of each example's query with all its positives, -1 being none."""
    total, count = np.zeros(len(rows), dtype=np.float32), np.zeros(len(rows), dtype=np.float32)
    for column in positives.T:
        own = np.flatnonzero(column >= 0)
        total[own] += (queries[rows[own]] * documents[column[own]]).sum(axis=1)
        count[own] += 1
    return total / count


def _search(
    queries: np.ndarray, documents: torch.Tensor, spared: np.ndarray, ceilings: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    asked, exclude, ceiling = (
        torch.from_numpy(np.ascontiguousarray(x)).to(documents.device) for x in (queries, spared, ceilings)
    )
    scores, indices = ops.top_k(asked, documents, k, exclude=exclude, ceiling=ceiling)
    return indices.cpu().numpy(), scores.cpu().numpy()


def _finite(what: str, vectors: np.ndarray) -> np.ndarray:
    if not np.isfinite(vectors).all():
        raise DataError(f"the model gives NaN or infinity for {what}")
    return np.ascontiguousarray(vectors, dtype=np.float32)


def _check(
    examples: Sequence[Example],
    k: int,
    ratio: float | None,
    depth: int,
    skip_top: int,
    sampling: str,
    temperature: float,
) -> None:
    if not examples:
        raise DataError("no examples to mine negatives for")
    if k < 1:
        raise ConfigError(f"k must be at least 1, got {k}")
    if depth < k:
        raise ConfigError(f"depth must be at least k, {k}, got {depth}")
    if skip_top < 0:
        raise ConfigError(f"skip_top must not be negative, got {skip_top}")
    if ratio is not None and not 0 < ratio <= 2:
        raise ConfigError(f"max_positive_ratio must be above 0 and at most 2, got {ratio}")
    if sampling not in ("top", "random", "softmax"):
        raise ConfigError(f"sampling must be 'top', 'random' or 'softmax', got {sampling!r}")
    if not temperature > 0:
        raise ConfigError(f"sampling_temperature must be above 0, got {temperature}")
