"""Evaluation of a model on a dataset: encode, search, score."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyqemb.data.arguments import Count, NotNegative, checked
from pyqemb.data.columns import POSITIVE, QUERY, Columns
from pyqemb.data.tables import has_splits, source_name
from pyqemb.errors import ConfigError, DataError
from pyqemb.evaluation import metrics
from pyqemb.evaluation.metrics import Interval, bootstrap_interval, bootstrap_statistic, shown
from pyqemb.evaluation.reranking import measure_reranker, read_ranked_examples
from pyqemb.evaluation.storage import Storage
from pyqemb.evaluation.tasks import Bitext, Retrieval, Sts, Task, is_folder, load_task
from pyqemb.model.device import search_device
from pyqemb.model.encoder import checked_vectors, open_model, unit_encoder
from pyqemb.model.protocols import PairScorer, VectorEncoder
from pyqemb.model.quantize import PRECISIONS, Precision

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
            lines.append(f"{name:12} {shown(at['value'])}  [{shown(at['low'])}, {shown(at['high'])}]")
        return "\n".join(lines)


@checked
def evaluate(
    model: VectorEncoder | PairScorer | str | Path,
    folder: Any,
    *,
    instruction: str | None = None,
    dim: Count | None = None,
    split: str | None = None,
    columns: Columns | None = None,
    precision: Precision = "float32",
    rescore: Count | None = None,
    bootstrap: NotNegative = 1000,
    seed: NotNegative = 0,
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
        precision: the precision of the stored vectors: float32 (default), int8, uint8, binary or ubinary. Queries and
            documents are quantized with the ranges of the documents.
        rescore: order this many of the best documents of each query again, by the float32 query and the quantized
            document (default: none).
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
    storage = Storage(precision, rescore)
    _check_evaluation(folder)
    task = load_task(folder, split, columns) if is_folder(folder) else None  # before the model is opened
    if isinstance(model, (str, Path)):
        model = open_model(model)
    if isinstance(model, PairScorer):
        if storage != Storage():
            raise ConfigError("precision and rescore are for embedding models; a reranker has no vectors")
        rows = measure_reranker(model, read_ranked_examples(folder, split, columns), instruction)
        intervals = {key: bootstrap_interval(list(row), bootstrap, seed) for key, row in rows.items()}
        per_query = {key: {str(i): float(v) for i, v in enumerate(row)} for key, row in rows.items()}
        return _report("reranking", folder, len(rows["accuracy"]), intervals, per_query)
    task = task or load_task(folder, split, columns)
    _check_storage(task, storage)
    encoder = unit_encoder(model)
    vectors = encode_task(encoder, task, instruction, dim)
    return _measure(task, vectors, folder, storage, search_device(encoder), bootstrap, seed)


@checked
def compare_storage(
    model: VectorEncoder | str | Path,
    folder: Any,
    *,
    dims: Sequence[Count | None] = (None,),
    precisions: Sequence[str] = PRECISIONS,
    rescore: Count | None = None,
    instruction: str | None = None,
    split: str | None = None,
    columns: Columns | None = None,
    bootstrap: NotNegative = 1000,
    seed: NotNegative = 0,
) -> list[Evaluation]:
    """Evaluate a model at several Matryoshka dimensions and precisions of the stored vectors; texts are encoded once.

    Args:
        model: an embedding model, as in `evaluate`.
        folder: the data, as in `evaluate`.
        dims: the dimensions; None is the model's own (default: only this one).
        precisions: the precisions (default: all).
        rescore: as in `evaluate`; quantized precisions are then evaluated without and with it.
        instruction: as in `evaluate`.
        split: as in `evaluate`.
        columns: as in `evaluate`.
        bootstrap: as in `evaluate`.
        seed: as in `evaluate`.

    Returns:
        A result of `evaluate` for each combination, in this order, with "dim", "precision", "rescore" and
        "bytes_per_vector".

    Raises:
        ConfigError: an argument is out of range, or the model is a reranker.
        DataError: as in `evaluate`.

    Example:
        >>> from pyqemb.testing.tiny import tiny_embedder
        >>> rows = [{"query": "a cat", "positive": "a cat sits"}, {"query": "tax", "positive": "tax law"}]
        >>> table = compare_storage(tiny_embedder(), rows, dims=[16, 8], precisions=["float32", "binary"], rescore=2)
        >>> [(row["dim"], row["precision"], row["rescore"], row["bytes_per_vector"]) for row in table][:3]
        [(16, 'float32', None, 64), (16, 'binary', None, 2), (16, 'binary', 2, 2)]
    """
    _check_evaluation(folder)
    if not dims or not precisions:
        raise ConfigError(f"{'precisions' if dims else 'dims'}: expected at least one")
    for name, values in (("dims", dims), ("precisions", precisions)):
        if len(set(values)) < len(values):
            raise ConfigError(f"{name}: expected each once, got {', '.join(map(str, values))}")
    if set(precisions) == {"float32"}:
        Storage(rescore=rescore)  # an error, unless it is None
    storages: list[Storage] = []
    for precision in precisions:
        storages.append(Storage(precision))
        if rescore is not None and precision != "float32":
            storages.append(Storage(precision, rescore))
    task = load_task(folder, split, columns)
    for storage in storages:
        _check_storage(task, storage)
    opened = open_model(model) if isinstance(model, (str, Path)) else model
    if isinstance(opened, PairScorer):
        raise ConfigError("model: expected an embedding model, got a reranker, which has no vectors")
    encoder = unit_encoder(opened)
    longest = None if None in dims else max(dim for dim in dims if dim is not None)
    first, second = encode_task(encoder, task, instruction, longest)
    results = []
    for dim in dims:
        cut = [truncated(vectors, dim) for vectors in (first, second)]
        for storage in storages:
            report = _measure(task, (cut[0], cut[1]), folder, storage, search_device(encoder), bootstrap, seed)
            size = cut[1].shape[1]
            results.append(
                Evaluation(
                    **report, dim=size, precision=storage.precision, rescore=storage.rescore,
                    bytes_per_vector=storage.bytes(size),
                )
            )  # fmt: skip
    return results


def _check_evaluation(folder: Any) -> None:
    if isinstance(folder, Mapping) and not has_splits(folder):  # a DatasetDict is a dict
        raise DataError(_not_a_dict(folder))


def _check_storage(task: Task, storage: Storage) -> None:
    if storage.rescore is not None and isinstance(task, Sts):
        raise ConfigError("rescore is for searches; graded pairs (STS) are compared without one")


def _report(
    name: str, folder: Any, count: int, values: Mapping[str, Interval], per_query: dict[str, dict[str, float]]
) -> Evaluation:
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


@checked
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
    if missing := sorted(qrels.keys() - rankings.keys()):
        raise ConfigError(f"[score_rankings] rankings must have the queries of qrels, lack {missing[0]!r}")
    return {
        name: {query: score(rankings[query], qrels[query]) for query in qrels} for name, score in _PER_QUERY.items()
    }


@checked
def retrieve(
    model: VectorEncoder, task: Retrieval, instruction: str | None = None, dim: Count | None = None
) -> dict[str, list[str]]:
    """Return the ids of the best 100 documents of each query.

    A query never gets the document with its own id, as in BEIR.

    Args:
        model: an Embedder, or any object with `encode_query` and `encode_document`.
        task: the queries and the corpus.
        instruction: instruction for queries without their own (default: the model's).
        dim: the Matryoshka dimension (default: the model's own).
    """
    return _rankings(task, encode_task(model, task, instruction, dim), Storage(), search_device(model))


def encode_task(
    model: VectorEncoder, task: Task, instruction: str | None = None, dim: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors of a task, float32: queries and documents, or first and second sentences.

    Args:
        model: an Embedder, or any object with `encode_query` and `encode_document`.
        task: the texts. Of a retrieval task, the vectors are in the order of its queries and its corpus.
        instruction: instruction for queries without their own (default: the model's).
        dim: the Matryoshka dimension (default: the model's own).
    """
    if not isinstance(task, Retrieval):
        first, second = (_encode_queries(model, texts, instruction, dim) for texts in (task.first, task.second))
        return first, second
    place = {query: index for index, query in enumerate(task.queries)}
    queries: np.ndarray | None = None
    for own, group in _groups(task):
        vectors = _encode_queries(model, [task.queries[q] for q in group], own or instruction, dim)
        queries = np.empty((len(place), vectors.shape[1]), dtype=np.float32) if queries is None else queries
        queries[[place[q] for q in group]] = vectors
    assert queries is not None  # a retrieval task has queries
    documents = model.encode_document(list(task.corpus.values()), dim=dim)
    return queries, checked_vectors(documents, len(task.corpus), "documents")


def truncated(vectors: np.ndarray, dim: int | None) -> np.ndarray:
    """The first `dim` features of float32 vectors [N, E], normalized again; None: the vectors themselves."""
    if dim is None or dim == vectors.shape[1]:
        return vectors
    if dim > vectors.shape[1]:
        raise ConfigError(f"dims: the vectors have {vectors.shape[1]} features, got {dim}")
    short = vectors[:, :dim]
    return short / np.maximum(np.linalg.norm(short, axis=1, keepdims=True), 1e-12)


def _rankings(
    task: Retrieval, vectors: tuple[np.ndarray, np.ndarray], storage: Storage, device: torch.device
) -> dict[str, list[str]]:
    documents = list(task.corpus)
    place = {document: index for index, document in enumerate(documents)}
    own = np.array([[place.get(query, -1)] for query in task.queries], dtype=np.int64)
    _, indices = storage.search(*vectors, k=_DEPTH, exclude=own, device=device)
    return {query: [documents[i] for i in row if i >= 0] for query, row in zip(task.queries, indices, strict=True)}


def _measure(
    task: Task,
    vectors: tuple[np.ndarray, np.ndarray],
    folder: Any,
    storage: Storage,
    device: torch.device,
    bootstrap: int,
    seed: int,
) -> Evaluation:
    if isinstance(task, Retrieval):
        per_query = score_rankings(_rankings(task, vectors, storage, device), task.qrels)
        values = {name: bootstrap_interval(list(row.values()), bootstrap, seed) for name, row in per_query.items()}
        return _report("retrieval", folder, len(task.queries), values, per_query)
    if isinstance(task, Sts):
        first, second = storage.stored(*vectors)
        similarity, scores = (first * second).sum(axis=1), np.asarray(task.scores)
        values = {
            "spearman": _correlation(metrics.spearman, similarity, scores, bootstrap, seed),
            "pearson": _correlation(metrics.pearson, similarity, scores, bootstrap, seed),
        }
        return _report("sts", folder, len(scores), values, {})
    matched = _match(vectors, task, storage, device)
    right = (matched == np.arange(len(matched))).astype(float)
    values = {
        "accuracy": bootstrap_interval(right, bootstrap, seed),
        "f1": bootstrap_statistic(lambda i: metrics.matching_f1(matched, i), len(matched), bootstrap, seed),
    }
    return _report(
        "bitext", folder, len(matched), values, {"accuracy": {str(i): float(v) for i, v in enumerate(right)}}
    )


def _correlation(
    function: Callable[[np.ndarray, np.ndarray], float], x: np.ndarray, y: np.ndarray, bootstrap: int, seed: int
) -> Interval:
    return bootstrap_statistic(lambda rows: function(x[rows], y[rows]), len(x), bootstrap, seed)


def _match(vectors: tuple[np.ndarray, np.ndarray], task: Bitext, storage: Storage, device: torch.device) -> np.ndarray:
    """The nearest second sentence of each first one; sentences equal to the correct one count as correct."""
    matched = storage.search(*vectors, k=1, device=device)[1][:, 0]
    same = [task.second[guess] == task.second[i] for i, guess in enumerate(matched)]
    return np.where(same, np.arange(len(matched)), matched)


def _groups(task: Retrieval) -> list[tuple[str | None, list[str]]]:
    """The queries, grouped by their instruction in the folder."""
    groups: dict[str | None, list[str]] = {}
    for query in task.queries:
        groups.setdefault(task.instructions.get(query), []).append(query)
    return list(groups.items())


def _encode_queries(model: VectorEncoder, texts: list[str], instruction: str | None, dim: int | None) -> np.ndarray:
    return checked_vectors(model.encode_query(texts, instruction=instruction, dim=dim), len(texts), "queries")
