"""Which pairs to keep: each filter keeps an example or drops it for a reason that is counted."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pyqemb import ops
from pyqemb.curation.mining import embed_documents, embed_queries
from pyqemb.data.example import Example
from pyqemb.errors import ConfigError

_TILE = 8192


@dataclass
class Filtered:
    """What a filter kept, in order, and how many it dropped for which reason."""

    kept: list[Example] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def consistency(
    model: Any,
    examples: Iterable[Example],
    *,
    top: int = 20,
    pool: Iterable[str] | None = None,
    instruction: str | None = None,
) -> Filtered:
    """Keep a pair when its document is among the `top` nearest of its query, out of all positives and `pool`.

    Equal texts are one document. Source: the consistency filter of E5 (arXiv 2212.03533), section 3.
    """
    examples = list(examples)
    if top < 1:
        raise ConfigError(f"top must be at least 1, got {top}")
    result = Filtered()
    if not examples:
        return result
    documents = list(dict.fromkeys([*(e.positive for e in examples), *(pool or ())]))
    place = {text: index for index, text in enumerate(documents)}
    rows, queries = embed_queries(model, examples, instruction)
    vectors = torch.from_numpy(embed_documents(model, documents))
    for start in range(0, len(examples), _TILE):
        some = examples[start : start + _TILE]
        _, found = ops.top_k(torch.from_numpy(queries[rows[start : start + _TILE]]), vectors, min(top, len(documents)))
        own = torch.tensor([place[example.positive] for example in some])
        for example, kept in zip(some, (found == own[:, None]).any(dim=1).tolist(), strict=True):
            _sort(result, example, None if kept else f"its document is not among the {top} nearest")
    return result


def similarity(
    model: Any,
    examples: Iterable[Example],
    *,
    min_sim: float | None = 0.7,
    max_sim: float | None = None,
    instruction: str | None = None,
) -> Filtered:
    """Keep a pair when the score of query and document lies between the bounds.

    min_sim 0.7 is the report's (arXiv 2506.05176, section 3.3); what a score means depends on the model.
    """
    examples = list(examples)
    if min_sim is not None and max_sim is not None and min_sim > max_sim:
        raise ConfigError(f"min_sim must not be above max_sim, got {min_sim} and {max_sim}")
    result = Filtered()
    if not examples:
        return result
    for example, score in zip(examples, pair_scores(model, examples, instruction), strict=True):
        low, high = min_sim is not None and score < min_sim, max_sim is not None and score > max_sim
        _sort(
            result, example, f"similarity below {min_sim}" if low else f"similarity above {max_sim}" if high else None
        )
    return result


def distinct(examples: Iterable[Example]) -> Filtered:
    """Keep the first of each (query, positive)."""
    result, seen = Filtered(), set()
    for example in examples:
        known = (example.query, example.positive) in seen
        seen.add((example.query, example.positive))
        _sort(result, example, "there already" if known else None)
    return result


def pair_scores(model: Any, examples: Sequence[Example], instruction: str | None = None) -> np.ndarray:
    """Similarity of each example's query and positive, [N]."""
    documents = {text: row for row, text in enumerate(dict.fromkeys(example.positive for example in examples))}
    rows, queries = embed_queries(model, examples, instruction)
    vectors = embed_documents(model, list(documents))
    return (queries[rows] * vectors[[documents[example.positive] for example in examples]]).sum(axis=1)


def _sort(result: Filtered, example: Example, reason: str | None) -> None:
    if reason is None:
        result.kept.append(example)
    else:
        result.dropped[reason] += 1
