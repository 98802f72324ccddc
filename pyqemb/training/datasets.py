"""The training datasets of a run, read from the configured files, one for each task."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

from pyqemb.data import mixing
from pyqemb.data.beir import is_beir
from pyqemb.data.example import Example, read_examples, read_located
from pyqemb.data.grouping import group_by_query
from pyqemb.data.loader import Loader
from pyqemb.data.rows import format_of
from pyqemb.data.shards import Shards, is_shards, read_shards, shards_of_parquet
from pyqemb.data.splits import dataset_files
from pyqemb.data.tables import is_saved
from pyqemb.data.token_cache import TokenCache, TokenFolder
from pyqemb.data.tokenizer import Tokenizer
from pyqemb.errors import ConfigError
from pyqemb.training.columns import UnusedByObjective
from pyqemb.training.config import DataSet, TrainConfig
from pyqemb.training.objectives import Objective, objective_of, with_in_batch_negatives


@dataclass(frozen=True)
class Datasets:
    """Examples by dataset, the configured weights (none: by the number of rows) and caps, and the objectives."""

    examples: Mapping[str, Sequence[Example]]
    weights: Mapping[str, float]
    objectives: Mapping[str, type[Objective]]
    max_share: Mapping[str, float] = field(default_factory=dict)
    max_epochs: Mapping[str, float] = field(default_factory=dict)
    loss_weights: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # of the objective, of the teacher

    @property
    def instructions(self) -> set[str | None]:
        """The instructions of all examples; for shards, at least two if there are several."""
        return {each for examples in self.examples.values() for each in _instructions(examples)}

    @property
    def most_negatives(self) -> int:
        """The largest number of negatives of an example in any dataset."""
        return max(map(most_negatives, self.examples.values()), default=0)

    @property
    def fingerprint(self) -> str:
        """The sha256 of all examples in order; shards have their own digest."""
        digest = hashlib.sha256()
        for name, examples in self.examples.items():
            digest.update(f"{name}\0{len(examples)}\0".encode())
            if isinstance(examples, Shards):
                digest.update(examples.digest.encode())
                continue
            for example in examples:
                digest.update(repr(astuple(example)).encode())
        return digest.hexdigest()


def read_datasets(config: TrainConfig) -> Datasets:
    """Read all data.

    DataError names file, line and column of an invalid row, or what a dataset lacks for its objective.
    """
    named: dict[str, dict[str, float]] = {"weight": {}, "max_share": {}, "max_epochs": {}}
    examples: dict[str, Sequence[Example]] = {}
    objectives: dict[str, type[Objective]] = {}
    tasks: set[str] = set()
    loss_weights: dict[str, tuple[float, float]] = {}
    for entry in config.data:
        by_task = _by_task(entry, config)
        tasks |= {task for task in by_task if task is not None}
        total = sum(map(len, by_task.values()))
        for task, rows in by_task.items():
            name = entry.label if len(by_task) == 1 else f"{entry.label}/{task}"
            if name in examples:
                raise ConfigError(f"data: two datasets are called {name!r}; give one of them another name")
            objectives[name] = with_in_batch_negatives(name, _objective(task, config), entry.in_batch_negatives)
            loss_weights[name] = entry.objective_weight, _teacher_weight(entry, config)
            if entry.group_positives:
                rows = _grouped(name, rows, objectives[name])
            examples[name] = rows
            objectives[name].check(name, rows)
            for key, part in (("weight", len(rows) / total), ("max_share", len(rows) / total), ("max_epochs", 1.0)):
                if (value := getattr(entry, key)) is not None:
                    named[key][name] = value * part
    if absent := sorted(config.loss.tasks.keys() - tasks):
        raise ConfigError(f"loss.tasks.{absent[0]}: no row has this task; the data have {_tasks(tasks)}")
    return Datasets(examples, named["weight"], objectives, named["max_share"], named["max_epochs"], loss_weights)


def _grouped(name: str, rows: Sequence[Example], objective: type[Objective]) -> Sequence[Example]:
    if not objective.several_positives:
        raise ConfigError(
            f"data: group_positives: dataset {name!r} is trained by {objective.name}, which takes one positive a query"
        )
    if isinstance(rows, Shards):
        raise ConfigError(
            f"data: group_positives: dataset {name!r} is read from shards or Parquet, whose rows are not held in "
            "memory; expected a JSONL or CSV file, or rows in memory"
        )
    return group_by_query(name, rows)


def make_loader(datasets: Datasets, config: TrainConfig) -> Loader:
    """The loader that the configuration describes."""
    train = config.train
    rows = {name: len(examples) for name, examples in datasets.examples.items()}
    sizes = {name: min(train.global_batch_size, count) for name, count in rows.items()}
    covering = sum(-(-count // sizes[name]) for name, count in rows.items())
    caps = dict(datasets.max_share)
    # A cap in epochs applies to the whole run, which is then one epoch of the loader, so shares are exact to a step.
    steps = train.steps or math.ceil(train.epochs * covering)
    for name, cap in mixing.caps_of_epochs(rows, sizes, datasets.max_epochs, steps).items():
        caps[name] = min(cap, caps.get(name, 1.0))
    return Loader(
        datasets.examples,
        train.global_batch_size,
        seed=train.seed,
        num_negatives=train.num_negatives,
        alpha=train.mixing_alpha,
        weights=datasets.weights,
        max_share=caps,
        steps_per_epoch=steps if datasets.max_epochs else None,
    )


def num_steps(config: TrainConfig, loader: Loader) -> int:
    """The number of steps of the run: `train.steps`, or that of `train.epochs`."""
    whole_run = any(entry.max_epochs for entry in config.data)  # the whole run is one epoch of the loader
    return config.train.steps or math.ceil((1 if whole_run else config.train.epochs) * loader.steps_per_epoch)


def mixture(loader: Loader, steps: int) -> list[mixing.MixtureRow]:
    """The share of each dataset in a run of that many steps."""
    rows = {name: len(examples) for name, examples in loader.datasets.items()}
    return mixing.table(rows, loader.batches, loader.batch_sizes, steps)


def token_cache(config: TrainConfig, tokenizer: Tokenizer) -> TokenCache | TokenFolder:
    """The token cache: in memory, or in a folder that all ranks and other runs share."""
    folder = config.train.token_cache
    return TokenCache(tokenizer) if folder is None else TokenFolder(tokenizer, folder)


def _by_task(entry: DataSet, config: TrainConfig) -> Mapping[str | None, Sequence[Example]]:
    """The rows of each task, checked for columns that its objective does not use."""
    unused: dict[str | None, UnusedByObjective] = {}
    by_task: dict[str | None, Sequence[Example]] = {}
    label = entry.path or entry.label
    if (shards := _shards(entry)) is not None:
        for task, rows in read_shards(shards).items():
            unused[task] = UnusedByObjective(task, _objective(task, config))
            unused[task].add_shards(label, rows)
            by_task[task] = rows.with_instruction(entry.instruction)
    else:
        lists: dict[str | None, list[Example]] = {}
        for where, example in read_located(entry.source, entry.split, entry.columns, name=entry.label):
            task = example.task
            if task not in lists:
                lists[task], unused[task] = [], UnusedByObjective(task, _objective(task, config))
            unused[task].add(where, example)
            if example.instruction is None and entry.instruction is not None:
                example = replace(example, instruction=entry.instruction)
            lists[task].append(example)
        by_task = {**lists}
    for task, found in unused.items():
        found.warn(label if task is None else f"{label} ({task})")
    return by_task


def _shards(entry: DataSet) -> Path | None:
    """The folder of shards for a dataset: the folder itself, or the one made from Parquet files; None: neither."""
    if entry.path is None or not (path := Path(entry.path)).is_dir() or is_beir(path) or is_saved(path):
        return None
    split, columns = entry.split, entry.columns
    if is_shards(path):
        return path if split is None and not columns else None
    if format_of(dataset_files(path, split)[0]) != ".parquet":
        return None
    return shards_of_parquet(path, read_examples(path, split, columns=columns), split, columns)


def _teacher_weight(entry: DataSet, config: TrainConfig) -> float:
    if config.teacher is None:
        return 0.0
    return config.teacher.weight if entry.teacher_weight is None else entry.teacher_weight


def _objective(task: str | None, config: TrainConfig) -> type[Objective]:
    return objective_of(task, config.loss, config.task)


def _tasks(found: set[str]) -> str:
    return f"the tasks {', '.join(sorted(found))}" if found else "no task"


def _instructions(examples: Sequence[Example]) -> set[str | None]:
    return examples.instructions if isinstance(examples, Shards) else {example.instruction for example in examples}


def most_negatives(examples: Sequence[Example]) -> int:
    """The largest number of negatives of an example."""
    if isinstance(examples, Shards):
        return examples.summary.most_negatives
    return max((len(example.negatives) for example in examples), default=0)
