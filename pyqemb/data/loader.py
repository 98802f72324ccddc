"""Training batches: each comes from one dataset and is a pure function of (seed, step).

Legend: B queries, M documents of the loss, S distinct texts of both, K candidates of a query.
"""

import heapq
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from pyqemb.data.example import Example
from pyqemb.data.grouping import GroupedExample
from pyqemb.data.mixing import sampling_weights
from pyqemb.data.order import Order
from pyqemb.data.pairs import format_pair
from pyqemb.data.tokenizer import Tokenizer
from pyqemb.errors import ConfigError

_LARGE = 1 << 22  # rows of a dataset above which its order is computed instead of stored


@dataclass(frozen=True, eq=False)
class GuideVectors:
    """A guide's vectors of the texts of a batch, [S, F], and the margin above which it masks a candidate."""

    vectors_SF: torch.Tensor
    margin: float
    relative: bool


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """The batch of a step before tokenization: the distinct texts, and which documents belong to which query.

    The indices in `texts` are ids of the texts; equal texts have equal ids.
    """

    examples: list[Example]
    texts: list[str]  # S, queries with their instruction and documents
    query_text: torch.Tensor  # int64 [B]
    document_text: torch.Tensor  # int64 [M]
    positive: torch.Tensor  # int64 [B], index among the M documents
    owner: torch.Tensor  # int64 [M], the query that the document belongs to
    # int64 [X, 2], a query and the index of a further positive of it
    more_positives: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.int64), kw_only=True)
    guide: GuideVectors | None = field(default=None, kw_only=True)
    candidates: torch.Tensor  # int64 [B, K], each query's positive and negatives among the M documents, padded with -1

    def text_partition(self, count: int) -> list[np.ndarray]:
        """The indices of the texts of each of `count` ranks, int64, with about the same number of bytes for each rank.

        Every rank computes the same partition.
        """
        sizes = np.array([len(text.encode()) + 1 for text in self.texts], dtype=np.int64)
        if count == 1:
            return [np.arange(len(sizes))]
        loads = [(0, number) for number in range(count)]
        parts: list[list[int]] = [[] for _ in range(count)]
        for text in np.argsort(-sizes, kind="stable").tolist():
            load, number = heapq.heappop(loads)
            parts[number].append(text)
            heapq.heappush(loads, (load + int(sizes[text]), number))
        return [np.array(part, dtype=np.int64) for part in parts]


class Loader:
    """Batches of examples: `batch(step)` depends only on the datasets, the options and the step.

    An epoch (of about `steps_per_epoch`; None: as many as cover all examples once) is a shuffled list of batches, with
    a share for each dataset. The batches of a dataset go through its examples in a new random order for every pass, so
    that each example is used once before any is repeated. A dataset that is smaller than the batch has smaller batches.
    """

    def __init__(
        self,
        datasets: Mapping[str, Sequence[Example]],
        batch_size: int,
        seed: int = 0,
        num_negatives: int | None = None,
        alpha: float = 1.0,
        weights: Mapping[str, float] | None = None,
        max_share: Mapping[str, float] | None = None,
        steps_per_epoch: int | None = None,
    ):
        if not datasets or not all(len(examples) for examples in datasets.values()):
            raise ConfigError(f"expected datasets that hold examples, got {[(n, len(d)) for n, d in datasets.items()]}")
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        self.datasets, self.seed, self.num_negatives = dict(datasets), seed, num_negatives
        self.names = list(self.datasets)
        self.batch_sizes = {name: min(batch_size, len(examples)) for name, examples in self.datasets.items()}
        self.batches = _batches(self.datasets, self.batch_sizes, alpha, weights or {}, max_share or {}, steps_per_epoch)
        self._order: dict[tuple[str, int], Order | np.ndarray] = {}  # only the most recent ones
        self._plan: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches in an epoch, over all datasets."""
        return sum(self.batches.values())

    def batch(self, step: int) -> list[Example]:
        """The examples of a step, counted from 0, with at most `num_negatives` negatives each."""
        examples = self.datasets[self.where(step)[0]]
        return self._with_negatives([examples[row] for row in self.rows(step)], step)

    def rows(self, step: int) -> list[int]:
        """The rows of its dataset that a step uses."""
        name, number = self.where(step)
        count, size = len(self.datasets[name]), self.batch_sizes[name]
        places = np.arange(number * size, (number + 1) * size)
        rows: list[int] = []
        for one in np.unique(places // count).tolist():  # a batch may end one pass and begin the next
            order, inside = self._pass(name, one), places[places // count == one] % count
            rows += (order(inside) if isinstance(order, Order) else order[inside]).tolist()
        return rows

    def where(self, step: int) -> tuple[str, int]:
        """The dataset of a step, and the number of earlier batches of this dataset."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._plan[0] != epoch:
            numbers = np.repeat(np.arange(len(self.names)), [self.batches[name] for name in self.names])
            self._plan = epoch, self._generator("epoch", epoch).permutation(numbers)
        plan = self._plan[1]
        name = self.names[plan[place]]
        return name, epoch * self.batches[name] + int((plan[:place] == plan[place]).sum())

    def _pass(self, name: str, number: int) -> Order | np.ndarray:
        """The order of one pass."""
        if (name, number) not in self._order:
            for key in [key for key in self._order if key[0] == name and abs(key[1] - number) > 1]:
                del self._order[key]
            generator, count = self._generator("set " + name, number), len(self.datasets[name])
            self._order[name, number] = Order(count, generator) if count > _LARGE else generator.permutation(count)
        return self._order[name, number]

    def _with_negatives(self, examples: list[Example], step: int) -> list[Example]:
        limit = self.num_negatives
        if limit is None or all(len(example.negatives) <= limit for example in examples):
            return examples
        keys = self._generator("negatives", step).random((len(examples), max(len(e.negatives) for e in examples)))
        return [
            _only(example, np.argsort(row[: len(example.negatives)])[:limit].tolist())
            if len(example.negatives) > limit
            else example
            for example, row in zip(examples, keys, strict=True)
        ]

    def _generator(self, purpose: str, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(purpose.encode()), number])


def _only(example: Example, chosen: Sequence[int]) -> Example:
    """The example with the chosen negatives only, and the teacher's scores of the remaining texts."""
    scores = example.scores and (example.scores[0], *(example.scores[1 + i] for i in chosen))
    return replace(example, negatives=tuple(example.negatives[i] for i in chosen), scores=scores)


def build_batch(examples: Sequence[Example], tokenizer: Tokenizer, own_rows: bool = False) -> TrainingBatch:
    """Build a batch for an embedder.

    Equal documents are one candidate of the loss, owned by the first query that has it. With `own_rows` they are
    separate candidates, as a loss over own negatives only requires.
    """
    builder = _Builder()
    rows: dict[str, int] = {}

    def row_of(query: int, text: str) -> int:
        if own_rows or text not in rows:
            rows[text] = builder.document(query, text)
        return rows[text]

    queries = tokenizer.format_queries([e.query for e in examples], [e.instruction for e in examples])
    query_text = [builder.text(text) for text in queries]
    for query, example in enumerate(examples):
        positive = row_of(query, example.positive)
        if isinstance(example, GroupedExample):
            builder.more_positives += [(query, row_of(query, text)) for text in example.more_positives]
        builder.candidates.append([positive, *(row_of(query, text) for text in example.negatives)])
    return builder.batch(examples, query_text)


def build_pairs(examples: Sequence[Example], instruction: str) -> TrainingBatch:
    """Build a batch for a reranker: each text is a query with one of its documents, and a separate candidate.

    `instruction` is for examples without one; `query_text` are the texts of the positives.
    """
    builder = _Builder()
    for query, example in enumerate(examples):
        task = instruction if example.instruction is None else example.instruction
        pairs = (format_pair(example.query, document, task) for document in (example.positive, *example.negatives))
        builder.candidates.append([builder.document(query, pair) for pair in pairs])
    positives = [candidates[0] for candidates in builder.candidates]
    return builder.batch(examples, [builder.document_text[positive] for positive in positives])


class _Builder:
    """Collects the texts of a batch, each once, and its documents."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}
        self.owner: list[int] = []
        self.document_text: list[int] = []
        self.candidates: list[list[int]] = []  # documents of each query, the positive first
        self.more_positives: list[tuple[int, int]] = []  # a query and a document

    def text(self, text: str) -> int:
        """The id of a text."""
        return self.texts.setdefault(text, len(self.texts))

    def document(self, query: int, text: str) -> int:
        """The index of a new document of a query."""
        self.owner.append(query)
        self.document_text.append(self.text(text))
        return len(self.owner) - 1

    def batch(self, examples: Sequence[Example], query_text: list[int]) -> TrainingBatch:
        width = max(map(len, self.candidates), default=0)
        padded = [row + [-1] * (width - len(row)) for row in self.candidates]

        def integers(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64)

        return TrainingBatch(
            list(examples), list(self.texts), integers(query_text), integers(self.document_text),
            integers([row[0] for row in self.candidates]), integers(self.owner),
            torch.tensor(padded, dtype=torch.int64).reshape(-1, width),
            more_positives=torch.tensor(self.more_positives, dtype=torch.int64).reshape(-1, 2),
        )  # fmt: skip


def _batches(
    datasets: Mapping[str, Sequence[Example]],
    sizes: Mapping[str, int],
    alpha: float,
    weights: Mapping[str, float],
    max_share: Mapping[str, float],
    steps: int | None,
) -> dict[str, int]:
    """The number of batches of each dataset in an epoch of about `steps`, by default enough to cover every example."""
    covering = {name: -(-len(examples) // sizes[name]) for name, examples in datasets.items()}
    if alpha == 1 and not weights and not max_share and steps is None:
        return covering
    rows = {name: len(examples) for name, examples in datasets.items()}
    found = sampling_weights(rows, alpha=alpha, weights=weights, max_share=max_share)
    steps = steps or sum(covering.values())
    return {name: max(1, round(steps * share)) for name, share in found.items()}
