"""Retrieval, similarity and bitext metrics, computed from arrays.

A ranking is a list of document ids, best first; `relevant` maps ids to grades above 0 (missing ids have grade 0).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Ranking = Sequence[str]
Relevant = Mapping[str, float]


class Interval(NamedTuple):
    """A mean with the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float


def ndcg_at_k(ranking: Ranking, relevant: Relevant, k: int = 10) -> float:
    """DCG / ideal DCG over the first k, DCG = sum_i grade_i / log2(i + 1) with i from 1 (trec_eval's ndcg_cut)."""
    discounts = 1.0 / np.log2(np.arange(2, k + 2))
    gains = np.array([relevant.get(document, 0.0) for document in ranking[:k]])
    ideal = np.sort(np.array(list(relevant.values()), dtype=float))[::-1][:k]
    best = float(ideal @ discounts[: len(ideal)]) if len(ideal) else 0.0
    return float(gains @ discounts[: len(gains)]) / best if best > 0 else 0.0


def recall_at_k(ranking: Ranking, relevant: Relevant, k: int = 100) -> float:
    """Share of the relevant documents among the first k."""
    wanted = {document for document, grade in relevant.items() if grade > 0}
    return len(wanted.intersection(ranking[:k])) / len(wanted) if wanted else 0.0


def mrr_at_k(ranking: Ranking, relevant: Relevant, k: int = 10) -> float:
    """1 / rank of the first relevant document, 0 if it is not among the first k."""
    for rank, document in enumerate(ranking[:k], start=1):
        if relevant.get(document, 0.0) > 0:
            return 1.0 / rank
    return 0.0


def accuracy_at_1(ranking: Ranking, relevant: Relevant) -> float:
    """1 if the first document is relevant, else 0."""
    return float(bool(ranking) and relevant.get(ranking[0], 0.0) > 0)


def shown(value: float) -> str:
    """A metric as text, "none" if it is not defined."""
    return f"{value:.4f}" if np.isfinite(value) else "none"


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values get the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2.0)[inverse]


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Linear correlation; NaN if one side is constant."""
    x, y = (np.asarray(v, dtype=np.float64) - np.mean(v) for v in (x, y))
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation."""
    return pearson(ranks(x), ranks(y))


def matching_f1(matched: np.ndarray, rows: np.ndarray | None = None) -> float:
    """Return the F1 of nearest-neighbor matching, 2PR / (P + R).

    `matched[i]` is the predicted partner of source i; the correct one is i.

    P is over distinct predictions, R over the sources; `rows` restricts both to some sources (a resample).
    """
    matched = np.asarray(matched)
    rows = np.arange(len(matched)) if rows is None else np.unique(rows)
    right = int((matched[rows] == rows).sum())
    if not right:
        return 0.0
    precision, recall = right / len(np.unique(matched[rows])), right / len(rows)
    return 2 * precision * recall / (precision + recall)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, n: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """The mean of `values` and its percentile bootstrap interval (Efron 1979): n resamples of all queries."""
    values = np.asarray(values, dtype=np.float64)
    return bootstrap_statistic(lambda picked: values[picked].mean(-1), len(values), n, seed, level)


def bootstrap_statistic(
    statistic: Callable[[np.ndarray], np.ndarray | float], count: int, n: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """statistic(indices) over all of `count` rows, and its percentile interval over n resamples of the rows."""
    if not count:
        return Interval(float("nan"), float("nan"), float("nan"))
    value = float(statistic(np.arange(count)))
    if n < 1:
        return Interval(value, value, value)
    generator = np.random.default_rng(seed)
    samples = [float(statistic(generator.integers(0, count, count))) for _ in range(n)]
    if np.isnan(samples).all():  # the correlation of vectors that are all equal
        return Interval(value, float("nan"), float("nan"))
    low, high = np.nanquantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
