"""Columns of a dataset that its objective does not use.

They are reported before the first step. A column that marks a pair as not positive is an error.
"""

import logging

from pyqemb.data.columns import UnusedColumns
from pyqemb.data.layouts import Example
from pyqemb.data.shards import Shards
from pyqemb.errors import DataError
from pyqemb.training.objectives import Objective

_OPTIONAL = ("negatives", "score", "scores", "query_embedding", "positive_embedding")


class UnusedByObjective:
    """Counts the columns that the objective of a task does not use."""

    def __init__(self, task: str | None, objective: type[Objective]):
        self._task, self._objective = task, objective
        self._columns = [column for column in _OPTIONAL if column not in objective.columns]
        self._unused = UnusedColumns()

    def add(self, where: str, example: Example) -> None:
        """Count the columns of a row that the objective does not use.

        Raises DataError for a pair whose score or label is 0 or less, if the objective treats every pair as positive.
        """
        for column in self._columns:
            value = getattr(example, column)
            if value is None or value == ():
                continue
            if column == "score" and self._objective.positive_pairs:
                if value <= 0:
                    raise DataError(
                        f"{where}: column 'score' (or 'label') is {value:g}, but {self._objective.name} treats every "
                        f"pair as positive; remove the row, or train on the scores: {self._hint()}"
                    )
                if value == 1:
                    continue
            self._unused.add({column}, where)

    def add_shards(self, path: str, shards: Shards) -> None:
        """`add` for shards, which are read only if their manifest lists such columns."""
        counts = shards.summary.__dict__
        if any(counts.get(column, counts["query_embedding"]) for column in self._columns):
            for number, example in enumerate(shards, start=1):
                self.add(f"{path}: row {number} of task {self._task!r}", example)

    def warn(self, name: str) -> None:
        """Log one line for the dataset, if there are any."""
        if self._unused:
            hint = f"; to train on the scores: {self._hint()}" if "score" in self._unused else ""
            logging.getLogger("pyqemb").warning(
                "dataset %r: columns that %s does not use: %s%s", name, self._objective.name, self._unused, hint
            )

    def _hint(self) -> str:
        if self._task is None:
            return 'give the rows task = "sts"'
        return f'set loss.tasks.{self._task} = "cosent"'
