"""Filters for lists in memory, which return the kept examples and counts of dropped ones by reason."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pyqemb.curation.ledger import Ledger
from pyqemb.curation.rank import Consistency
from pyqemb.curation.similarity import Similarity
from pyqemb.data.arguments import Count, checked
from pyqemb.data.example import Example
from pyqemb.errors import ConfigError
from pyqemb.model.protocols import QueryDocumentEncoder


@dataclass
class Filtered:
    """The examples that a filter kept, in order, and the number of dropped ones by reason."""

    kept: list[Example] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


@checked
def consistency(
    model: QueryDocumentEncoder,
    examples: Iterable[Example],
    *,
    top: Count = 20,
    pool: Iterable[str] | None = None,
    instruction: str | None = None,
) -> Filtered:
    """Keep a pair if its document is among the `top` nearest to its query, out of all positives and `pool`.

    Equal texts are one document.

    Args:
        model: an Embedder, or any object with `encode_query` and `encode_document`.
        examples: the pairs, in order.
        top: the lowest rank that is kept, counted from 1 (default 20).
        pool: further documents to rank the positives among (default: none).
        instruction: instruction for queries, used for those without their own (default: the model's query prompt).

    Returns:
        The pairs that were kept, and how many were dropped for which reason.

    Raises:
        ConfigError: `top` is below 1.

    Source: the consistency filter of E5 (arXiv 2212.03533), section 3.
    """
    step = Consistency(model=model, top=top, instruction=instruction)
    return _filtered(lambda ledger: step.judge(examples, ledger, () if pool is None else pool))


@checked
def similarity(
    model: QueryDocumentEncoder,
    examples: Iterable[Example],
    *,
    min_sim: float | None = 0.7,
    max_sim: float | None = None,
    instruction: str | None = None,
) -> Filtered:
    """Keep a pair if the score of query and document is between the bounds.

    Args:
        model: an Embedder, or any object with `encode_query` and `encode_document`.
        examples: the pairs, in order.
        min_sim: the lowest cosine similarity that is kept. The default, 0.7, is the report's (arXiv 2506.05176, section
            3.3); suitable values depend on the model. None: no lower bound.
        max_sim: the highest cosine similarity that is kept (default: no upper bound).
        instruction: instruction for queries, used for those without their own (default: the model's query prompt).

    Returns:
        The pairs that were kept, and how many were dropped for which reason.

    Raises:
        ConfigError: `min_sim` is above `max_sim`.
    """
    if min_sim is not None and max_sim is not None and min_sim > max_sim:
        raise ConfigError(f"min_sim must not be above max_sim, got {min_sim} and {max_sim}")
    step = Similarity(model=model, min_sim=min_sim, max_sim=max_sim, instruction=instruction)
    return _filtered(lambda ledger: step.run(examples, ledger))


@checked
def distinct(examples: Iterable[Example]) -> Filtered:
    """Keep the first of several pairs with equal query and positive, compared by characters.

    Args:
        examples: the pairs, in order.

    Returns:
        The pairs that were kept, and how many were dropped.
    """

    def judged(ledger: Ledger) -> Iterator[Example]:
        seen = set()
        for example in examples:
            pair = example.query, example.positive
            if ledger.judge(example, "there already" if pair in seen else None):
                seen.add(pair)
                yield example

    return _filtered(judged)


def _filtered(run: Any) -> Filtered:
    ledger = Ledger(samples=0)
    return Filtered(list(run(ledger)), ledger.dropped)
