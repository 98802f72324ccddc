"""The results of a demo run.

One object is written as results.json and read by the table, the plots and the report.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyqemb.data.files import atomic_file

MEAN = "mean"
NDCG = "nDCG@10"
ACCURACY = "accuracy@1"
METRICS = (NDCG, ACCURACY)
UNTRAINED, BM25 = "untrained", "BM25"  # the rows to compare with


@dataclass(frozen=True, slots=True)
class Score:
    """A value with the bounds of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Row:
    """One line of the table: scores[corpus][group or "mean"][metric]."""

    name: str
    scores: dict[str, dict[str, dict[str, Score]]]
    folder: str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """The cost of one step; `memory` is the peak of the process so far, in GiB."""

    name: str
    seconds: float
    memory: float
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """A question and the results of the merged model: (score, source, text, is an answer), best first."""

    group: str
    question: str
    answer: str
    rank: int
    returned: list[tuple[float, str, str, bool]]


@dataclass
class Results:
    """Everything that the report of a demo shows; `save` writes it as JSON."""

    data: str
    groups: list[str]
    corpora: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    best: list[Found] = field(default_factory=list)
    worst: list[Found] = field(default_factory=list)
    model: str = ""
    instruction: str | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def columns(self) -> list[str]:
        """The groups of the mean, the mean, and the groups that are reported separately."""
        named = [*self.groups, MEAN]
        others = {group for row in self.rows for scores in row.scores.values() for group in scores}
        return named + sorted(others - set(named))

    def mean(self, name: str, metric: str = NDCG) -> Score:
        """The mean of a row over the first corpus."""
        row = next(row for row in self.rows if row.name == name)
        return row.scores[self.corpora[0]][MEAN][metric]

    def save(self, path: Path) -> None:
        """Write all fields as JSON, completely or not at all."""
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def markdown(results: Results) -> str:
    """The tables in Markdown, one for each corpus and metric; a cell has a value and its interval."""
    return "\n".join(_markdown_parts(results))


def _markdown_parts(results: Results) -> Iterable[str]:
    columns = results.columns()
    for metric in METRICS:
        for corpus in results.corpora:
            yield f"### {metric}, {corpus}\n"
            yield "| | " + " | ".join(columns) + " |"
            yield "| --- |" + " ---: |" * len(columns)
            for row in results.rows:
                cells = [row.scores[corpus].get(column, {}).get(metric, "") for column in columns]
                yield f"| {row.name} | " + " | ".join(str(cell) for cell in cells) + " |"
            yield ""
