"""Hard-negative mining: documents that a model ranks high for a query, without probable false negatives."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pyqemb.curation.rules import Rules
from pyqemb.curation.search import Search
from pyqemb.curation.search import approximate as approximate_search
from pyqemb.curation.search import exact as exact_search
from pyqemb.data.arguments import Count, NotNegative, check, checked
from pyqemb.data.columns import Columns
from pyqemb.data.example import Example, read_examples
from pyqemb.errors import DataError
from pyqemb.model.cached_encoder import CachedEncoder, chunks
from pyqemb.model.device import search_device
from pyqemb.model.encoder import checked_vectors, unit_encoder
from pyqemb.model.progress import progress_bar
from pyqemb.model.protocols import QueryDocumentEncoder

_TILE = 8192  # queries searched at a time
_JUDGED = 256  # queries at a time, with a reranker
Reranker = Callable[[list[tuple[str, str]]], Any]  # (query, document) pairs -> scores


@dataclass(frozen=True)
class MiningReport:
    """Statistics of mining; `short` counts rows with fewer than k negatives.

    The scores are means over the rows with a negative, None if no row has one.
    """

    rows: int
    documents: int
    short: int
    positive_score: float | None
    negative_score: float | None

    @property
    def scores(self) -> str:
        """The mean scores as text."""
        if self.positive_score is None or self.negative_score is None:
            return "no row has a negative"
        return f"mean score of positives {self.positive_score:.3f}, of negatives {self.negative_score:.3f}"


@dataclass(frozen=True, repr=False)
class Mined:
    """The result of `mine`.

    Attributes:
        examples: the examples in order, each with its negatives, hardest first.
        report: counts and mean scores.
    """

    examples: list[Example]
    report: MiningReport

    def __repr__(self) -> str:
        report = self.report
        return (
            f"Mined({report.rows} examples from {report.documents} documents; {report.scores}; "
            f"{report.short} examples with fewer than k negatives)"
        )


_NOT_MINED = "classification", "sts"  # tasks


@dataclass(frozen=True)
class Negatives:
    """indices [N, k] int64, -1 for none; scores [N, k] float32, -inf for none; positive_scores [N]."""

    indices: np.ndarray
    scores: np.ndarray
    positive_scores: np.ndarray

    @classmethod
    def none(cls, count: int, k: int) -> "Negatives":
        """Empty results for `count` rows, to be filled in."""
        return cls(
            np.full((count, k), -1, dtype=np.int64),
            np.full((count, k), -np.inf, dtype=np.float32),
            np.empty(count, dtype=np.float32),
        )


@checked
def mine(
    model: QueryDocumentEncoder,
    examples: Any,
    *,
    columns: Columns | None = None,
    corpus: Iterable[str] | None = None,
    k: Count = 7,
    max_positive_ratio: float | None = 0.95,
    margin: float | None = None,
    max_score: float | None = None,
    mean_margin: float | None = None,
    skip_top: NotNegative = 0,
    depth: Count = 100,
    sampling: Literal["top", "random", "softmax"] = "top",
    sampling_temperature: float = 0.05,
    seed: NotNegative = 0,
    instruction: str | None = None,
    pool_of: Callable[[str], str] | None = None,
    reranker: Reranker | None = None,
    approximate: str | None = None,
    cache: str | Path | None = None,
) -> Mined:
    """Give every example up to `k` hard negatives, hardest first.

    Existing negatives of the examples are replaced, and scores of a teacher are dropped; a warning counts both.
    Examples of the tasks `classification` (the negatives are wrong labels) and `sts` (graded pairs) stay as they are,
    and their texts are no candidates.

    Args:
        model: an Embedder, or any object with `encode_query` and `encode_document`.
        examples: queries with their positives: a list of Examples or dicts, a Dataset, a DataFrame, a path, or another
            source of `read_examples`. A positive of a query is never its negative; queries are compared by text.
        columns: the columns of the rows, as in `read_examples` (default: the names of a known layout).
        corpus: further documents to choose from, besides the positives of all examples. Equal texts are one document.
        k: the maximum number of negatives per example (default 7).
        max_positive_ratio: a negative scores at most this ratio of the positive's score (TopK-PercPos): at most
            positive - (1 - ratio) * |positive|. Above 0 and at most 2 (default 0.95). None: no such limit.
        margin: a negative scores at most the positive's score minus this cosine similarity (default: no such limit).
        max_score: a negative scores at most this cosine similarity (default: no such limit).
        mean_margin: a negative scores at most the mean score of the query's positives plus this (default: no such
            limit; Qwen3-VL-Embedding, section 3.3).
        skip_top: the number of best candidates within these limits to skip (default 0).
        depth: the number of candidates to consider after the skipped ones, at least `k` (default 100).
        sampling: how negatives are chosen from the candidates: "top", the best `k` (default); "random", `k` drawn
            uniformly; "softmax", `k` drawn without replacement in proportion to exp(score / sampling_temperature).
        sampling_temperature: temperature of the "softmax" sampling, above 0 (default 0.05).
        seed: seed of the "random" and "softmax" sampling (default 0).
        instruction: instruction for queries, used for examples without their own (default: the model's query prompt).
        pool_of: maps a document to the name of its pool, e.g. its language. The negatives of a query come from the pool
            of its positive (default: one pool).
        reranker: scores (query, document) pairs. The positives and the best skip_top + depth candidates of the model
            are scored again, and all limits apply to these scores (default: no reranker).
        approximate: a faiss index_factory string, such as "HNSW32" (default: exact search).
        cache: a folder that stores the vectors between calls (`CachedEncoder`; default: no cache).

    Returns:
        The examples in order, with their negatives, and the statistics of the mining.

    Raises:
        ConfigError: an argument is out of range.
        DataError: the examples cannot be read, there are none, or the model does not return a finite vector for each
            text.

    Example:
        >>> from pyqemb.testing.tiny import tiny_embedder
        >>> rows = [{"query": f"question {i}", "positive": f"answer {i}"} for i in range(4)]
        >>> mined = pyqemb.mine(tiny_embedder(), rows, k=1, max_positive_ratio=None)
        >>> mined
        Mined(4 examples from 4 documents; mean score of positives ..., of negatives ...;
        0 examples with fewer than k negatives)
        >>> len(mined.examples[0].negatives)
        1

    Source: NV-Retriever (arXiv 2407.15831), section 3; Qwen3-VL-Embedding (arXiv 2601.04720), section 3.3.
    """
    rules = Rules(
        k=k,
        max_positive_ratio=max_positive_ratio,
        margin=margin,
        max_score=max_score,
        mean_margin=mean_margin,
        skip_top=skip_top,
        depth=depth,
        sampling=sampling,
        sampling_temperature=sampling_temperature,
    )
    corpus = [] if corpus is None else list(corpus)
    check("mine", "corpus", corpus, Sequence[str])
    everything = list(read_examples(examples, columns=columns))
    examples = to_mine(everything)
    warn_of_losses(examples)
    model = unit_encoder(model if cache is None else CachedEncoder(model, cache))
    documents = list(dict.fromkeys([*(e.positive for e in examples), *corpus]))
    place = {text: index for index, text in enumerate(documents)}
    query_rows, query_vectors = embed_queries(model, examples, instruction)
    vectors = embed_documents(model, documents)
    excluded = positives_of_each_text(examples, place)
    positives = np.array([place[e.positive] for e in examples])

    def rescore(row: int, chosen: np.ndarray) -> np.ndarray:
        assert reranker is not None
        texts = [documents[i] for i in chosen]
        return np.asarray(reranker([(examples[row].query, text) for text in texts]), dtype=np.float32)

    found = Negatives.none(len(examples), k)
    generator = np.random.default_rng(seed)
    for rows, members in _pools(positives, documents, pool_of):
        mined = search_negatives(
            query_vectors, query_rows[rows], vectors if members is None else vectors[members], rules,
            excluded[rows] if members is None else within(excluded[rows], members),
            positives[rows] if members is None else within(positives[rows], members),
            generator=generator, device=search_device(model), approximate_by=approximate,
            rescore=None if reranker is None else _Rescoring(rescore, rows, members),
        )  # fmt: skip
        found.positive_scores[rows], found.scores[rows] = mined.positive_scores, mined.scores
        indices = mined.indices if members is None else np.where(mined.indices < 0, -1, members[mined.indices])
        found.indices[rows] = indices
    return mined_from(everything, documents, found, len(documents))


def mined_from(
    everything: Sequence[Example], documents: Sequence[str] | Mapping[int, str], found: Negatives, num_documents: int
) -> Mined:
    """The result of mining.

    Args:
        everything: all examples, those of other tasks too.
        documents: the text of each index of `found`.
        found: the negatives of the examples that get some.
        num_documents: the number of documents.
    """
    chosen = iter(found.indices.tolist())
    examples = [
        replace(each, negatives=tuple(documents[i] for i in next(chosen) if i >= 0), scores=())
        if _is_mined(each)
        else each
        for each in everything
    ]
    return Mined(examples, _report(num_documents, found))


def _report(num_documents: int, found: Negatives) -> MiningReport:
    there = found.indices >= 0
    counts = there.sum(axis=1)
    some = counts > 0
    means = np.where(there, found.scores, 0).sum(axis=1)[some] / counts[some]
    return MiningReport(
        rows=len(found.indices),
        documents=num_documents,
        short=int((counts < found.indices.shape[1]).sum()),
        positive_score=float(found.positive_scores[some].mean()) if some.any() else None,
        negative_score=float(means.mean()) if some.any() else None,
    )


def _is_mined(example: Example) -> bool:
    return example.task not in _NOT_MINED


def to_mine(examples: Sequence[Example]) -> list[Example]:
    """The examples that get negatives. DataError if there are some, but none of them does."""
    chosen = [example for example in examples if _is_mined(example)]
    if examples and not chosen:
        raise DataError(f"mine: every row has the task {' or '.join(_NOT_MINED)}, which has no mined negatives")
    if len(chosen) < len(examples):
        logging.getLogger("pyqemb").info(
            "mine: %s of %s rows are kept as they are: their task is %s",
            f"{len(examples) - len(chosen):,}", f"{len(examples):,}", " or ".join(_NOT_MINED),
        )  # fmt: skip
    return chosen


def warn_of_losses(examples: Sequence[Example]) -> None:
    """Log how many examples lose negatives and scores."""
    log = logging.getLogger("pyqemb")
    replaced, scored = sum(bool(e.negatives) for e in examples), sum(bool(e.scores) for e in examples)
    if replaced:
        log.warning(
            "mine: the negatives of %s of %s rows are replaced by mined ones", f"{replaced:,}", f"{len(examples):,}"
        )
    if scored:
        log.warning(
            "mine: the scores of %s of %s rows are dropped: they belong to other negatives",
            f"{scored:,}",
            f"{len(examples):,}",
        )


@dataclass(frozen=True)
class _Rescoring:
    """A reranker that maps rows and documents of a part of the pool to those of the whole pool."""

    rescore: Callable[[int, np.ndarray], np.ndarray]
    rows: np.ndarray
    members: np.ndarray | None

    def __call__(self, row: int, indices: np.ndarray) -> np.ndarray:
        return self.rescore(int(self.rows[row]), indices if self.members is None else self.members[indices])


def search_negatives(
    query_vectors: np.ndarray,
    query_rows: np.ndarray,
    documents: np.ndarray,
    rules: Rules,
    excluded: np.ndarray,
    positives: np.ndarray,
    *,
    generator: np.random.Generator,
    device: Any = "cpu",
    approximate_by: str | None = None,
    rescore: Callable[[int, np.ndarray], np.ndarray] | None = None,
) -> Negatives:
    """Mine negatives for given vectors; the part of `mine` after the texts are encoded.

    Args:
        query_vectors: float32 [Q, E], the unit vectors of the distinct queries.
        query_rows: int64 [N], the row of each example in `query_vectors`.
        documents: float32 [M, E], the unit vectors of the documents; the array may be memory-mapped.
        rules: the limits of negatives, and how they are chosen.
        excluded: int64 [N, X], the indices of all positives of the row's query, padded with -1.
        positives: int64 [N], the index of each example's positive in `documents`.
        generator: the random generator, if the rules sample negatives.
        device: the device of the exact search (default "cpu").
        approximate_by: a faiss index_factory string (default: exact search).
        rescore: maps (row, document indices) to new scores of these documents for the row's query (default: none).
    """
    count = len(query_rows)
    search: Search = (
        approximate_search(documents, approximate_by) if approximate_by else exact_search(documents, device)
    )
    result = Negatives.none(count, rules.k)
    wanted = min(rules.depth + rules.skip_top, len(documents))
    with progress_bar("Queries", count) as advance:
        for part in chunks(count, _TILE if rescore is None else _JUDGED):
            queries = query_vectors[query_rows[part]]
            own = (queries * documents[positives[part]]).sum(axis=1)
            if rescore is None:
                means = mean_scores(queries, documents, excluded[part]) if rules.mean_margin is not None else own
                found_scores, found = search(queries, excluded[part], rules.ceilings(own, means), wanted)
            else:
                found_scores, found = search(queries, excluded[part], np.full(len(queries), np.inf, np.float32), wanted)
                own, found_scores, found = _rescored(rescore, rules, part.start, positives[part], excluded[part], found)
            result.positive_scores[part] = own
            places = rules.choose(found_scores, generator)  # padded with -1 and -inf
            result.indices[part, : places.shape[1]] = np.take_along_axis(found, places, axis=1)
            result.scores[part, : places.shape[1]] = np.take_along_axis(found_scores, places, axis=1)
            advance(len(queries))
    return result


def _rescored(
    rescore: Callable[[int, np.ndarray], np.ndarray],
    rules: Rules,
    start: int,
    positives: np.ndarray,
    excluded: np.ndarray,
    found: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (scores of the positives, scores, indices) of the reranker, best first.

    The index of a document above its ceiling becomes -1.
    """
    own = np.empty(len(positives), dtype=np.float32)
    scores = np.full(found.shape, -np.inf, dtype=np.float32)
    indices = np.full(found.shape, -1, dtype=np.int64)
    for row, (candidates, positive, others) in enumerate(zip(found, positives, excluded, strict=True)):
        candidates, others = candidates[candidates >= 0], others[others >= 0]
        given = rescore(start + row, np.concatenate([others, candidates]))  # the positive is one of `others`
        positives_scores, values = given[: len(others)], given[len(others) :]
        own[row], mean = positives_scores[others == positive][0], positives_scores.mean()
        order = np.argsort(-values, kind="stable")
        order = order[values[order] <= rules.ceilings(own[row : row + 1], np.array([mean]))[0]]
        scores[row, : len(order)], indices[row, : len(order)] = values[order], candidates[order]
    return own, scores, indices


def _pools(
    positives: np.ndarray, documents: list[str], pool_of: Callable[[str], str] | None
) -> Iterable[tuple[np.ndarray, np.ndarray | None]]:
    """Yield (rows of examples, their documents) of each pool; None: all documents."""
    if pool_of is None:
        return [(np.arange(len(positives)), None)]
    names = np.array([pool_of(text) for text in documents])
    return [
        (np.flatnonzero(names[positives] == name), np.flatnonzero(names == name))
        for name in np.unique(names[positives])
    ]


def within(indices: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The positions of indices among the sorted members, -1 for other indices."""
    at = np.searchsorted(members, indices).clip(max=len(members) - 1)
    return np.where(members[at] == indices, at, -1)


def queries_by_instruction(
    examples: Sequence[Example], instruction: str | None
) -> tuple[np.ndarray, dict[str | None, list[str]]]:
    """(row of each example [N], distinct queries of each instruction, in the order of the rows)."""
    asked = [(example.query, example.instruction or instruction) for example in examples]
    groups: dict[str | None, dict[str, None]] = {}
    for query, own in asked:
        groups.setdefault(own, {})[query] = None
    rows = {pair: row for row, pair in enumerate((query, own) for own, some in groups.items() for query in some)}
    return np.array([rows[pair] for pair in asked]), {own: list(some) for own, some in groups.items()}


def embed_queries(model: Any, examples: Sequence[Example], instruction: str | None) -> tuple[np.ndarray, np.ndarray]:
    """(row of each example [N], unit vectors of the distinct queries [Q, E]); examples may have own instructions."""
    rows, groups = queries_by_instruction(examples, instruction)
    encoded = [
        checked_vectors(model.encode_query(texts, instruction=own), len(texts), "queries")
        for own, texts in groups.items()
    ]
    return rows, encoded[0] if len(encoded) == 1 else np.concatenate(encoded)


def embed_documents(model: Any, documents: Sequence[str]) -> np.ndarray:
    """Unit vectors [M, E] float32."""
    return checked_vectors(model.encode_document(list(documents)), len(documents), "documents")


def positives_of_each_text(examples: Sequence[Example], place: dict[str, int]) -> np.ndarray:
    """int64 [N, most]: all documents that are positives of the example's query text, padded with -1."""
    by_query: dict[str, dict[int, None]] = {}
    for example in examples:
        by_query.setdefault(example.query, {})[place[example.positive]] = None
    excluded = np.full((len(examples), max(map(len, by_query.values()))), -1, dtype=np.int64)
    for row, example in enumerate(examples):
        own = list(by_query[example.query])
        excluded[row, : len(own)] = own
    return excluded


def mean_scores(queries: np.ndarray, documents: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """float32 [N]: the mean score of each query with its positives [N, X], padded with -1."""
    total, count = np.zeros(len(queries), dtype=np.float32), np.zeros(len(queries), dtype=np.float32)
    for column in positives.T:
        own = np.flatnonzero(column >= 0)
        total[own] += (queries[own] * documents[column[own]]).sum(axis=1)
        count[own] += 1
    return total / count
