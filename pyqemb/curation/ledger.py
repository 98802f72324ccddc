"""The statistics of a step: the number of kept examples, and of dropped ones by reason.

It also holds histograms of measured values, and samples of both outcomes for the report.
"""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyqemb.data.example import Example

KEPT = "kept"
Drop = Callable[[Example, str, dict[str, float]], None]


class Histogram:
    """Counts by outcome in bins of equal width, or, without a width, in eight bins per factor of two."""

    def __init__(self, width: float | None):
        self.width = width
        self.counts: dict[int, Counter[str]] = defaultdict(Counter)

    def add(self, value: float, outcome: str) -> None:
        """Count one value under an outcome: "kept", or the reason why the example was dropped."""
        place = value / self.width if self.width else 8 * math.log2(max(value, 1))
        self.counts[math.floor(place + 1e-6)][outcome] += 1

    def start_of(self, index: int) -> float:
        """Return the lower bound of the bin with this index."""
        return index * self.width if self.width else 2 ** (index / 8)

    def rows(self) -> list[dict[str, Any]]:
        """The bins in ascending order: the start of each, and its counts by outcome."""
        return [{"from": self.start_of(i), **self.counts[i]} for i in sorted(self.counts)]


@dataclass(frozen=True)
class Sample:
    """An example of the report, with the values that the step measured for it."""

    example: Example
    values: dict[str, float]


@dataclass
class Ledger:
    """The statistics of one step.

    `folder` is for files that a later run reads again, and `work` for temporary ones; `on_drop` is called with every
    dropped example.

    `samples` examples of each outcome are stored, sampled uniformly with `seed` (reservoir sampling).
    """

    name: str = ""
    folder: Path | None = None
    on_drop: Drop | None = None
    samples: int = 20
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    drawn: dict[str, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    notes: dict[str, Any] = field(default_factory=dict)  # e.g. the values of quantile bounds
    work: Path | None = None

    def __post_init__(self) -> None:
        self._random = random.Random(f"{self.seed} {self.name}")

    def keep(self, example: Example, **values: float) -> Example:
        """Count an example as kept and return it. `values` holds measured values by name."""
        self._record(example, KEPT, values)
        return example

    def drop(self, example: Example, reason: str, **values: float) -> None:
        """Count an example as dropped for a reason and call `on_drop`."""
        self._record(example, reason, values)
        if self.on_drop is not None:
            self.on_drop(example, reason, values)

    def judge(self, example: Example, reason: str | None, **values: float) -> bool:
        """Drop the example for the reason, or keep it if the reason is None.

        Returns:
            Whether the example was kept.
        """
        if reason is None:
            self.keep(example, **values)
        else:
            self.drop(example, reason, **values)
        return reason is None

    @property
    def kept(self) -> int:
        """The number of kept examples."""
        return self.counts[KEPT]

    @property
    def dropped(self) -> Counter[str]:
        """The number of dropped examples by reason."""
        return Counter({reason: count for reason, count in self.counts.items() if reason != KEPT})

    def summary(self) -> dict[str, Any]:
        """Return the entry of this step in report.json: counts, notes and histograms."""
        return {
            "step": self.name,
            "seen": self.counts.total(),
            "kept": self.kept,
            "dropped": dict(self.dropped.most_common()),
            **({"notes": self.notes} if self.notes else {}),
            "histograms": {name: histogram.rows() for name, histogram in self.histograms.items()},
        }

    def _record(self, example: Example, outcome: str, values: dict[str, float]) -> None:
        self.counts[outcome] += 1
        for name, value in values.items():
            if name not in self.histograms:
                self.histograms[name] = Histogram(0.02 if "similarity" in name or "confidence" in name else None)
            self.histograms[name].add(value, outcome)
        drawn = self.drawn[outcome]
        if len(drawn) < self.samples:
            drawn.append(Sample(example, values))
        elif (place := self._random.randrange(self.counts[outcome])) < self.samples:
            drawn[place] = Sample(example, values)
