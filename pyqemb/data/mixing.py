"""Sampling of datasets in a run: weights by size or as configured, with caps, and the resulting epochs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pyqemb.errors import ConfigError


@dataclass(frozen=True)
class MixtureRow:
    """One row of the table that is logged before training.

    `epochs`: the expected number of times that each of its rows is used.
    """

    name: str
    rows: int
    share: float
    batch_size: int
    steps: float
    epochs: float


def sampling_weights(
    rows: Mapping[str, int],
    *,
    alpha: float = 1.0,
    weights: Mapping[str, float] | None = None,
    max_share: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return the fraction of the steps that each dataset gets.

    It is proportional to the dataset's weight, or to rows ** alpha, but never above its cap. Steps above a cap go to
    the other datasets in proportion, so that the sum of min(cap, level * mass) is 1.

    Args:
        rows: the number of rows of each dataset.
        alpha: the exponent of the rows: 1 is proportional to size, 0 is uniform (default 1).
        weights: a weight for each dataset instead of its rows ** alpha (default: none).
        max_share: the highest fraction of some of the datasets (default: none).

    Raises:
        ConfigError: only some datasets have a weight, or the caps leave steps that no dataset may take.
    """
    weights, caps = weights or {}, max_share or {}
    if set(weights) and set(weights) != set(rows):
        raise ConfigError(f"give a weight for every dataset or for none; missing: {sorted(set(rows) - set(weights))}")
    mass = {name: float(weights.get(name, count**alpha)) for name, count in rows.items()}
    capped: dict[str, float] = {}
    while True:
        free = {name: value for name, value in mass.items() if name not in capped}
        left, total = 1 - sum(capped.values()), sum(free.values())
        if not free:
            if left > 1e-9:
                raise ConfigError(
                    f"max_share and max_epochs leave {left:.1%} of the steps to no dataset; take fewer steps or raise "
                    "them"
                )
            return {name: capped[name] for name in rows}
        over = {name: caps[name] for name, value in free.items() if name in caps and left * value / total > caps[name]}
        if not over:
            return {name: capped.get(name, left * mass[name] / total) for name in rows}
        capped |= over


def caps_of_epochs(
    rows: Mapping[str, int], batch_sizes: Mapping[str, int], max_epochs: Mapping[str, float], steps: int
) -> dict[str, float]:
    """The share of `steps` at which each dataset has been used `max_epochs` times."""
    return {name: epochs * rows[name] / (batch_sizes[name] * steps) for name, epochs in max_epochs.items()}


def table(
    rows: Mapping[str, int], batches: Mapping[str, int], batch_sizes: Mapping[str, int], steps: int
) -> list[MixtureRow]:
    """The mixture of `steps` steps, given the `batches` of each dataset in an epoch of the loader."""
    total = sum(batches.values())
    found = []
    for name, count in rows.items():
        share = batches[name] / total
        found.append(
            MixtureRow(name, count, share, batch_sizes[name], steps * share, steps * share * batch_sizes[name] / count)
        )
    return found


def lines(found: Iterable[MixtureRow]) -> list[str]:
    """The table as text, one dataset a line."""
    found = list(found)
    width = max(len("dataset"), *(len(row.name) for row in found))
    head = f"{'dataset':{width}}  {'rows':>12}  {'share':>6}  {'batch':>6}  {'steps':>9}  {'epochs':>7}"
    return [head] + [
        f"{row.name:{width}}  {row.rows:>12,}  {row.share:>6.1%}  {row.batch_size:>6}  {row.steps:>9,.0f}  "
        f"{row.epochs:>7.2f}"
        for row in found
    ]
