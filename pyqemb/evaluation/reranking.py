"""Evaluation of rerankers on examples with negatives."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyqemb.data.columns import Columns
from pyqemb.data.example import Example, read_located
from pyqemb.data.tables import has_splits, source_name
from pyqemb.errors import DataError
from pyqemb.model.protocols import PairScorer

METRICS = ("accuracy@1", "mrr@10", "ndcg@10", "accuracy")


def measure_reranker(
    model: PairScorer, examples: Sequence[Example], instruction: str | None = None
) -> dict[str, np.ndarray]:
    """Measure how a reranker ranks each example's positive among its negatives.

    Args:
        model: a Reranker, or any object with its `score`.
        examples: examples with negatives, from `read_ranked_examples`.
        instruction: instruction for examples without their own (default: the model's).

    Returns:
        {metric: float64 [N]}, a value for each example with negatives. Negatives with a score equal to the positive's
        rank above it. `accuracy` is the fraction of the example's pairs that a threshold of 0.5 classifies correctly.

    Raises:
        DataError: a score is not finite.
    """
    scores = _scores(model, examples, instruction)
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for own in scores:
        if not np.isfinite(own).all():
            raise DataError("the model gives NaN or infinity for pairs")
        place = 1 + int((own[1:] >= own[0]).sum())
        values["accuracy@1"].append(float(place == 1))
        values["mrr@10"].append(1 / place if place <= 10 else 0.0)
        values["ndcg@10"].append(1 / float(np.log2(1 + place)) if place <= 10 else 0.0)
        values["accuracy"].append((float(own[0] > 0.5) + float((own[1:] <= 0.5).sum())) / len(own))
    return {name: np.array(each) for name, each in values.items()}


def read_ranked_examples(
    source: Any, split: str | None = None, columns: Columns | None = None, name: str | None = None
) -> list[Example]:
    """The examples with negatives, of any source of `read_examples`.

    DataError: the source cannot be read, or no example has negatives.

    `split` None: test, for a DatasetDict or a dataset of the hub. `name`: the name of data in memory, for messages.
    """
    split = "test" if split is None and has_splits(source) else split
    located = read_located(source, split, columns, name=name)
    examples = [example for _, example in located if example.negatives]
    if not examples:
        raise DataError(f"{name or source_name(source)}: no example has negatives to tell the positive from")
    return examples


def _scores(model: PairScorer, examples: Sequence[Example], instruction: str | None) -> list[np.ndarray]:
    """The scores of each example, its positive first."""
    pairs = [(e.query, document) for e in examples for document in (e.positive, *e.negatives)]
    instructions = [e.instruction or instruction for e in examples for _ in range(1 + len(e.negatives))]
    scores = np.asarray(model.score(pairs, instruction=instructions))
    return np.split(scores, np.cumsum([1 + len(e.negatives) for e in examples])[:-1])
