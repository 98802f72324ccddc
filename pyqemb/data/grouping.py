"""Rows with the same query as one example with several positives."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from pyqemb.data.layouts import Example
from pyqemb.errors import DataError


@dataclass(frozen=True, slots=True)
class GroupedExample(Example):
    """An example with further positives of its query."""

    more_positives: tuple[str, ...] = ()


_COMMON = "query", "instruction", "task"
_OF_ONE_POSITIVE = "score", "scores", "query_embedding", "positive_embedding"


def group_by_query(dataset: str, examples: Iterable[Example]) -> list[Example]:
    """One example for each query and instruction, at the place of its first row.

    Its positives are those of all rows, each once. Its negatives too, without those that are positives.

    Args:
        dataset: the name of the dataset, for messages.
        examples: the rows.

    Raises:
        DataError: a row has a value that belongs to one positive, such as a score.

    Example:
        >>> rows = [Example("q", "a", ("n",)), Example("other", "x"), Example("q", "b", ("n", "a"))]
        >>> group_by_query("faq", rows)[0].more_positives
        ('b',)
    """
    groups: dict[tuple[str | None, ...], list[Example]] = {}
    for number, example in enumerate(examples, start=1):
        for name in _OF_ONE_POSITIVE:
            if getattr(example, name) not in (None, ()):
                raise DataError(
                    f"dataset {dataset!r}: example {number} has {name}, which belongs to one positive; set "
                    "group_positives = false"
                )
        groups.setdefault(tuple(getattr(example, name) for name in _COMMON), []).append(example)
    return [_grouped(rows) for rows in groups.values()]


def _grouped(rows: list[Example]) -> Example:
    positives = list(dict.fromkeys(row.positive for row in rows))
    negatives = dict.fromkeys(text for row in rows for text in row.negatives if text not in positives)
    values = {field.name: getattr(rows[0], field.name) for field in fields(Example)}
    values |= {"positive": positives[0], "negatives": tuple(negatives)}
    return GroupedExample(**values, more_positives=tuple(positives[1:])) if len(positives) > 1 else Example(**values)
