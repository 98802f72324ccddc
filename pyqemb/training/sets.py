"""The sets that a run trains on: read from the configured files, one set for each task."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from pyqemb.data.example import Example, read_examples
from pyqemb.data.loader import Loader
from pyqemb.errors import ConfigError
from pyqemb.training.config import TrainConfig
from pyqemb.training.loss import check_examples, objective_of


@dataclass(frozen=True)
class Sets:
    """Examples by set name, the weights that were asked for (none: by rows), and what each set is trained with."""

    examples: Mapping[str, Sequence[Example]]
    weights: Mapping[str, float]
    objectives: Mapping[str, str]

    @property
    def instructions(self) -> set[str | None]:
        return {example.instruction for examples in self.examples.values() for example in examples}

    @property
    def fingerprint(self) -> str:
        """sha256 of every example in order: another set, row or text gives another."""
        digest = hashlib.sha256()
        for name, examples in self.examples.items():
            digest.update(f"{name}\0{len(examples)}\0".encode())
            for example in examples:
                digest.update(repr(astuple(example)).encode())
        return digest.hexdigest()


def read_sets(config: TrainConfig) -> Sets:
    """Read all data. DataError names file, line and column of a bad row, or what an objective misses in a set."""
    examples: dict[str, list[Example]] = {}
    weights: dict[str, float] = {}
    objectives: dict[str, str] = {}
    for entry in config.data:
        by_task: dict[str | None, list[Example]] = {}
        for example in read_examples(entry.path):
            if example.instruction is None and entry.instruction is not None:
                example = replace(example, instruction=entry.instruction)
            by_task.setdefault(example.task, []).append(example)
        total = sum(map(len, by_task.values()))
        for task, rows in by_task.items():
            base = entry.name or Path(entry.path).name.split(".")[0]
            name = base if len(by_task) == 1 else f"{base}/{task}"
            if name in examples:
                raise ConfigError(f"data: two sets are called {name!r}; give one of them another name")
            examples[name], objectives[name] = rows, objective_of(task, config.loss)
            check_examples(name, rows, objectives[name])
            if entry.weight is not None:
                weights[name] = entry.weight * len(rows) / total
    return Sets(examples, weights, objectives)


def make_loader(sets: Sets, config: TrainConfig) -> Loader:
    """The loader that the configuration describes."""
    train = config.train
    return Loader(
        sets.examples,
        train.global_batch_size,
        seed=train.seed,
        num_negatives=train.num_negatives,
        alpha=train.mixing_alpha,
        weights=sets.weights,
    )
