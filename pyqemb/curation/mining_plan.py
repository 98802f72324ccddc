"""What a mining job will take, estimated from samples of its texts; nothing is written."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pyqemb.curation import mining_tasks
from pyqemb.curation.corpus import read_corpus
from pyqemb.curation.mining import queries_by_instruction
from pyqemb.curation.mining_tasks import sources_of
from pyqemb.curation.search import exact
from pyqemb.data.arguments import Count, NotNegative, checked
from pyqemb.data.columns import Columns
from pyqemb.data.example import check_output
from pyqemb.data.files import check_writable
from pyqemb.data.rows import estimate_rows
from pyqemb.errors import ConfigError
from pyqemb.jobs.samples import free_space, peak_memory, spread, timed
from pyqemb.jobs.text import clock_text, size_text
from pyqemb.model.device import search_device
from pyqemb.model.encoder import checked_vectors, open_encoder, unit_encoder

_TEXTS = 256  # texts of a sample
_BATCH = 32  # encoded between two looks at the clock
_QUERIES, _DOCUMENTS = 1024, 32768  # random vectors that are searched to measure the speed


@dataclass(frozen=True)
class MiningPlan:
    """What a mining job will take.

    Attributes:
        examples: the number of examples that get negatives.
        queries: the number of distinct queries.
        documents: the number of documents.
        is_estimate: whether `documents` is an estimate: in a corpus, equal texts are counted more than once, and the
            number of lines may be estimated from its first mebibyte.
        parts: the number of parts of vectors.
        searches: the number of parts of the search, and so the largest number of tasks that can search together.
        tokens: the number of tokens of all texts, None if the model does not count them.
        tokens_per_second: the speed of one task, measured on samples; None if the model does not count them.
        scores_per_second: the speed of the search of one task, measured on random vectors.
        tasks: the number of tasks.
        encode_seconds: the time until all texts are encoded, if all tasks are as fast.
        search_seconds: the time of the search after that.
        memory: bytes of the memory of one task: its peak so far, and what the search needs besides.
        disk: bytes on the disk at the end of the job.
        free: bytes that are free on the disk of the output.
    """

    examples: int
    queries: int
    documents: int
    is_estimate: bool
    parts: int
    searches: int
    tokens: int | None
    tokens_per_second: float | None
    scores_per_second: float
    tasks: int
    encode_seconds: float
    search_seconds: float
    memory: int
    disk: int
    free: int

    def lines(self) -> list[str]:
        """The plan as text."""
        about, few = "about " if self.is_estimate else "", "" if self.disk <= self.free else "; this is too little"
        tasks = f"{self.tasks:,} task{'s' if self.tasks > 1 else ''}"
        tokens = (
            "" if self.tokens is None else f"about {self.tokens:,} tokens, {self.tokens_per_second:,.0f} tokens/s, "
        )
        return [
            f"texts   {self.examples:,} examples, {self.queries:,} queries, {about}{self.documents:,} documents",
            f"parts   {self.parts:,} of vectors, {self.searches:,} of the search",
            f"encode  {tokens}about {clock_text(self.encode_seconds)} with {tasks}",
            f"search  {self.scores_per_second / 1e6:,.0f} million scores/s, about {clock_text(self.search_seconds)} "
            f"with {tasks}",
            f"memory  {size_text(self.memory)}, each task",
            f"disk    {size_text(self.disk)} at the end; {size_text(self.free)} are free{few}",
        ]


@checked
def plan_mine(
    model: str | Path,
    examples: str | Path,
    out: str | Path,
    *,
    tasks: Count = 1,
    split: str | None = None,
    columns: Columns | None = None,
    corpus: str | Path | None = None,
    skip_top: NotNegative = 0,
    depth: Count = 100,
    instruction: str | None = None,
    seconds: float = 10.0,
) -> MiningPlan:
    """Estimate what `mine_task` will take with these arguments, for all tasks together. Nothing is written.

    The examples are read completely. Samples of the queries, the positives and the first documents of the corpus are
    encoded, and random vectors are searched. The estimate is poor if later texts have other lengths.

    Args:
        model: as for `mine_task`.
        examples: as for `mine_task`.
        out: as for `mine_task`.
        tasks: the number of tasks, each on a machine of its own (default 1).
        split: as for `mine_task`.
        columns: as for `mine_task`.
        corpus: as for `mine_task`.
        skip_top: as for `mine_task`.
        depth: as for `mine_task`.
        instruction: as for `mine_task`.
        seconds: the time after which no more texts of the samples are encoded (default 10).

    Returns:
        The number of texts and parts, tokens, speed, time, memory and disk.

    Raises:
        ConfigError: an argument is out of range. DataError: an input is invalid or empty.

    Example:
        >>> import json
        >>> from pathlib import Path
        >>> from pyqemb.curation import plan_mine
        >>> from pyqemb.testing.tiny import tiny_embedder
        >>> model = tiny_embedder().save_pretrained("model")
        >>> rows = [{"query": f"question {i}", "positive": f"answer {i}"} for i in range(4)]
        >>> _ = Path("pairs.json").write_text(json.dumps(rows))
        >>> plan = plan_mine(model, "pairs.json", "mined.jsonl")
        >>> plan.queries, plan.documents, plan.parts, plan.searches
        (4, 4, 2, 1)
    """
    if not seconds > 0:
        raise ConfigError(f"seconds must be above 0, got {seconds}")
    out = Path(out)
    sources = sources_of(examples, split, columns, corpus)
    check_output(out)
    check_writable(out)
    encoder: Any = unit_encoder(open_encoder(model))
    rows = sources.read()
    some = [] if sources.corpus is None else list(islice(read_corpus(sources.corpus), mining_tasks.ROWS))
    count = _corpus_rows(sources.corpus)
    by_instruction = queries_by_instruction(rows.mined, instruction)[1]
    own, queries = max(by_instruction.items(), key=lambda item: len(item[1]))
    num_queries = sum(map(len, by_instruction.values()))
    samples = [
        _measure(queries, num_queries, "query", own, encoder, seconds / 3),
        _measure(rows.positives, len(rows.positives), "document", None, encoder, seconds / 3),
        _measure(some, count, "document", None, encoder, seconds / 3),
    ]
    width = max(sample.width for sample in samples)
    documents, num_examples = len(rows.positives) + count, len(rows.mined)
    shard, tile, wanted = mining_tasks.ROWS * mining_tasks.SHARD, mining_tasks.TILE, skip_top + depth
    searches = -(-documents // shard) * -(-num_examples // tile)
    speed = _search_speed(width, wanted, documents, encoder)
    encode_seconds = sum(sample.seconds for sample in samples)
    tokens = None if any(sample.tokens is None for sample in samples) else sum(sample.tokens or 0 for sample in samples)
    together = min(num_examples, tile * mining_tasks.TILES)
    pool = min(documents, mining_tasks.ROWS * mining_tasks.BLOCK)
    return MiningPlan(
        examples=num_examples, queries=num_queries, documents=documents, is_estimate=sources.corpus is not None,
        parts=sum(-(-size // mining_tasks.ROWS) for size in (documents, *map(len, by_instruction.values()))),
        searches=searches, tokens=tokens, tokens_per_second=None if tokens is None else tokens / encode_seconds,
        scores_per_second=speed, tasks=tasks, encode_seconds=encode_seconds / tasks,
        search_seconds=num_examples * documents / (speed * min(tasks, searches)),
        memory=peak_memory()
        + 4 * width * (pool + together) + 36 * wanted * min(together, tile) + 12 * wanted * together,
        disk=4 * width * (documents + num_queries) + -(-documents // shard) * num_examples * (12 * wanted + 4),
        free=free_space(out),
    )  # fmt: skip


@dataclass(frozen=True)
class _Sample:
    """The time and the tokens of all texts of a kind, estimated from some of them."""

    seconds: float
    tokens: int | None
    width: int


def _measure(
    texts: Sequence[str], count: int, side: str, instruction: str | None, model: Any, seconds: float
) -> _Sample:
    """Encode some of the texts, spread evenly; `count` is the number of all texts of their kind."""
    if not texts:
        return _Sample(0.0, 0, 0)
    sample = spread(texts, _TEXTS)
    counts = model.token_counts(sample, side, instruction) if hasattr(model, "token_counts") else None

    def encode(some: list[str]) -> np.ndarray:
        found = model.encode_document(some) if side == "document" else model.encode_query(some, instruction=instruction)
        return checked_vectors(found, len(some), "texts")

    width = encode(sample[:1]).shape[1]  # the first call prepares memory
    done, spent = timed(encode, sample, _BATCH, seconds)
    if counts is None:
        return _Sample(count * spent / done, None, width)
    tokens = count * sum(counts) / len(counts)
    return _Sample(tokens * spent / max(sum(counts[:done]), 1), round(tokens), width)


def _search_speed(width: int, wanted: int, documents: int, model: Any) -> float:
    """Scores per second of an exact search among random vectors."""
    draw = np.random.default_rng(0)
    pool = draw.standard_normal((min(documents, _DOCUMENTS), width), dtype=np.float32)
    queries = draw.standard_normal((_QUERIES, width), dtype=np.float32)
    find: Callable[..., Any] = exact(pool, search_device(model))
    given = np.full((_QUERIES, 1), -1), np.full(_QUERIES, np.inf, np.float32), min(wanted, len(pool))
    find(queries[:64], given[0][:64], given[1][:64], given[2])
    start = time.perf_counter()
    find(queries, *given)
    return _QUERIES * len(pool) / (time.perf_counter() - start)


def _corpus_rows(corpus: str | None) -> int:
    """The number of documents of the corpus."""
    if corpus is None:
        return 0
    known = estimate_rows(Path(corpus)) if Path(corpus).is_file() else None
    return sum(1 for _ in read_corpus(corpus)) if known is None else known[0]
