"""Evaluation of a model on a dataset: encode, search, score."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyqemb import ops
from pyqemb.data.columns import POSITIVE, QUERY, Columns
from pyqemb.data.tables import has_splits, source_name
from pyqemb.errors import ConfigError, DataError
from pyqemb.evaluation import metrics
from pyqemb.evaluation.metrics import Interval, bootstrap_interval, bootstrap_statistic
from pyqemb.evaluation.reranking import measure_reranker, read_ranked_examples
from pyqemb.evaluation.tasks import Bitext, Retrieval, Sts, Task, is_folder, load_task
from pyqemb.model.device import search_device
from pyqemb.model.encoder import open_model, unit_encoder
from pyqemb.model.protocols import PairScorer, VectorEncoder

_DEPTH = 100
_PER_QUERY = {
    "ndcg@10": lambda ranking, relevant: metrics.ndcg_at_k(ranking, relevant, 10),
    "recall@10": lambda ranking, relevant: metrics.recall_at_k(ranking, relevant, 10),
    "recall@100": lambda ranking, relevant: metrics.recall_at_k(ranking, relevant, 100),
    "mrr@10": lambda ranking, relevant: metrics.mrr_at_k(ranking, relevant, 10),
    "accuracy@1": metrics.accuracy_at_1,
}

_STS = ("spearman", "pearson")
_BITEXT = ("accuracy", "f1")


def metric_names(task: Task) -> tuple[str, ...]:
    """The metrics that `evaluate` reports for a task."""
    if isinstance(task, Retrieval):
        return tuple(_PER_QUERY)
    return _STS if isinstance(task, Sts) else _BITEXT


class Evaluation(dict[str, Any]):
    """The result of `evaluate`: a dict that prints as a short table."""

    def __repr__(self) -> str:
        lines = [f"{self['task']}, {self['folder']}, {self['count']} rows, with 95 % intervals"]
        for name, at in self["metrics"].items():
            lines.append(f"{name:12} {at['value']:.4f}  [{at['low']:.4f}, {at['high']:.4f}]")
        return "\n".join(lines)


def evaluate(
    model: VectorEncoder | PairScorer | str | Path,
    folder: Any,
    *,
    instruction: str | None = None,
    dim: int | None = None,
    split: str | None = None,
    columns: Columns | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Evaluate a model on a task (see `tasks`), or a reranker on examples (see `reranking`).

    Args:
        model: an Embedder, any object with `encode_query` and `encode_document`, a Reranker, or a model folder.
        folder: a retrieval (BEIR), STS or bitext folder, or examples: a file, a Dataset, a DataFrame, a list, or
            another source of `read_examples`. Examples that all have a score are graded pairs. Otherwise they are a
            retrieval task, whose corpus is all positives and negatives. A reranker needs examples with negatives.
        instruction: instruction for queries (default: the model's own). Queries with an instruction in the folder keep
            it.
        dim: the Matryoshka dimension: vectors are truncated to it and normalized again (default: the model's own).
        split: the split of a retrieval folder, as in qrels/SPLIT.tsv (default: test, or the only one, which is logged),
            or of a DatasetDict or a dataset of the hub (default: test).
        columns: the columns of examples, as in `read_examples` (default: the names of a known layout).
        bootstrap: the number of resamples for the 95 % intervals, 0 for none (default 1000).
        seed: seed of the resampling (default 0).

    Returns:
        {"task", "folder", "count", "metrics": {name: {"value", "low", "high"}}, "per_query": {name: {id: value}}}.
        Values are from 0 to 1, correlations from -1 to 1. "per_query" is empty for STS.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the data cannot be read, or the model returns values that are not finite.

    Example:
        >>> from pyqemb.testing.tiny import tiny_embedder
        >>> pairs = [("a cat", "a cat sits", 4), ("a cat", "tax law", 0), ("a dog", "dogs run", 3)]
        >>> rows = [{"sentence1": first, "sentence2": second, "score": score} for first, second, score in pairs]
        >>> print(pyqemb.evaluate(tiny_embedder(), rows))
        sts, ..., 3 rows, with 95 % intervals
        spearman ...
        pearson ...
    """
    if bootstrap < 0:
        raise ConfigError(f"bootstrap must be 0 or more resamples, got {bootstrap}")
    if isinstance(folder, Mapping) and not has_splits(folder):  # a DatasetDict is a dict
        raise DataError(_not_a_dict(folder))
    task = load_task(folder, split, columns) if is_folder(folder) else None  # before the model is opened
    if isinstance(model, (str, Path)):
        model = open_model(model)
    if isinstance(model, PairScorer):
        rows = measure_reranker(model, read_ranked_examples(folder, split, columns), instruction)
        intervals = {key: bootstrap_interval(list(row), bootstrap, seed) for key, row in rows.items()}
        per_query = {key: {str(i): float(v) for i, v in enumerate(row)} for key, row in rows.items()}
        name, count, values = "reranking", len(rows["accuracy"]), intervals
    else:
        task = task or load_task(folder, split, columns)
        name, count, values, per_query = _measure(unit_encoder(model), task, instruction, dim, bootstrap, seed)
    return Evaluation({
        "task": name,
        "folder": source_name(folder),
        "count": count,
        "metrics": {key: value._asdict() for key, value in values.items()},
        "per_query": per_query,
    })  # fmt: skip


def _not_a_dict(given: Mapping[Any, Any]) -> str:
    """The message about a dict as a dataset, with the call that was meant."""
    shown = ", ".join(map(repr, list(given)[:5])) + (", ..." if len(given) > 5 else "")
    if {"rows", "path"} & given.keys():
        call = "give the rows or the path itself: pyqemb.evaluate(model, data, split=..., columns=..., instruction=...)"
    elif {*QUERY, *POSITIVE} & given.keys():
        call = 'give a list with a dict for each row: pyqemb.evaluate(model, [{"query": ..., "positive": ...}, ...])'
    else:
        call = "give one dataset: pyqemb.evaluate(model, data)"
    return f"evaluate: expected a dataset, got a dict with the keys {shown}; {call}"


def rank(
    query_vectors: np.ndarray,
    document_vectors: np.ndarray,
    k: int = _DEPTH,
    exclude: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, indices) [B, min(k, M)] of the best documents of each query by dot product.

    Args:
        query_vectors: float32 [B, E].
        document_vectors: float32 [M, E].
        k: the number of documents per query (default 100).
        exclude: int64 [B, X], indices of documents to exclude for each query, padded with -1 (default: none).
        device: the device of the search (default "cpu").
    """
    queries, documents = (
        torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).to(device)
        for x in (query_vectors, document_vectors)
    )
    forbidden = None if exclude is None else torch.from_numpy(np.ascontiguousarray(exclude, dtype=np.int64)).to(device)
    scores, indices = ops.top_k(queries, documents, min(k, len(documents)), exclude=forbidden)
    return scores.cpu().numpy(), indices.cpu().numpy()


def score_rankings(
    rankings: Mapping[str, Sequence[str]], qrels: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Score rankings by nDCG@10, recall@10 and @100, MRR@10 and accuracy@1.

    Args:
        rankings: {query id: document ids, best first}.
        qrels: {query id: {document id: grade}}; grades above 0 are relevant.

    Returns:
        {metric: {query id: value}}, with a value for each query of `qrels`.
    """
    return {
        name: {query: score(rankings[query], qrels[query]) for query in qrels} for name, score in _PER_QUERY.items()
    }


def retrieve(
    model: VectorEncoder, task: Retrieval, instruction: str | None = None, dim: int | None = None
) -> dict[str, list[str]]:
    """Return the ids of the best 100 documents of each query.

    A query never gets the document with its own id, as in BEIR.

    Args:
        model: an Embedder, or any object with `encode_query` and `encode_document`.
        task: the queries and the corpus.
        instruction: instruction for queries without their own (default: the model's).
        dim: the Matryoshka dimension (default: the model's own).
    """
    documents, groups = list(task.corpus), _groups(task)
    queries = [query for _, group in groups for query in group]
    query_vectors = np.concatenate(
        [_encode_queries(model, [task.queries[q] for q in group], own or instruction, dim) for own, group in groups]
    )
    place = {document: index for index, document in enumerate(documents)}
    own = np.array([[place.get(query, -1)] for query in queries], dtype=np.int64)
    vectors = _finite("documents", model.encode_document([task.corpus[d] for d in documents], dim=dim))
    _, indices = rank(query_vectors, vectors, exclude=own, device=search_device(model))
    return {query: [documents[i] for i in row if i >= 0] for query, row in zip(queries, indices, strict=True)}


def _measure(
    model: VectorEncoder, task: Task, instruction: str | None, dim: int | None, bootstrap: int, seed: int
) -> tuple[str, int, dict[str, Interval], dict[str, dict[str, float]]]:
    if isinstance(task, Retrieval):
        per_query = score_rankings(retrieve(model, task, instruction, dim), task.qrels)
        values = {name: bootstrap_interval(list(row.values()), bootstrap, seed) for name, row in per_query.items()}
        return "retrieval", len(task.queries), values, per_query
    first, second = (_encode_queries(model, texts, instruction, dim) for texts in (task.first, task.second))
    if isinstance(task, Sts):
        similarity, scores = (first * second).sum(axis=1), np.asarray(task.scores)
        values = {
            "spearman": _correlation(metrics.spearman, similarity, scores, bootstrap, seed),
            "pearson": _correlation(metrics.pearson, similarity, scores, bootstrap, seed),
        }
        return "sts", len(scores), values, {}
    assert isinstance(task, Bitext)
    matched = _match(first, second, task, search_device(model))
    right = (matched == np.arange(len(matched))).astype(float)
    values = {
        "accuracy": bootstrap_interval(right, bootstrap, seed),
        "f1": bootstrap_statistic(lambda i: metrics.matching_f1(matched, i), len(matched), bootstrap, seed),
    }
    return "bitext", len(matched), values, {"accuracy": {str(i): float(v) for i, v in enumerate(right)}}


def _correlation(
    function: Callable[[np.ndarray, np.ndarray], float], x: np.ndarray, y: np.ndarray, bootstrap: int, seed: int
) -> Interval:
    return bootstrap_statistic(lambda rows: function(x[rows], y[rows]), len(x), bootstrap, seed)


def _match(first: np.ndarray, second: np.ndarray, task: Bitext, device: torch.device) -> np.ndarray:
    """The nearest second sentence of each first one; sentences equal to the correct one count as correct."""
    matched = rank(first, second, k=1, device=device)[1][:, 0]
    same = [task.second[guess] == task.second[i] for i, guess in enumerate(matched)]
    return np.where(same, np.arange(len(matched)), matched)


def _groups(task: Retrieval) -> list[tuple[str | None, list[str]]]:
    """The queries, grouped by their instruction in the folder."""
    groups: dict[str | None, list[str]] = {}
    for query in task.queries:
        groups.setdefault(task.instructions.get(query), []).append(query)
    return list(groups.items())


def _encode_queries(model: VectorEncoder, texts: list[str], instruction: str | None, dim: int | None) -> np.ndarray:
    return _finite("queries", model.encode_query(texts, instruction=instruction, dim=dim))


def _finite(what: str, vectors: np.ndarray) -> np.ndarray:
    if not np.isfinite(vectors).all():
        raise DataError(f"the model gives NaN or infinity for {what}")
    return vectors
