"""Evaluation during training.

`DevSets` turns the datasets of the [eval] section into a function of the model, and checks them before the first step.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pyqemb.data import beir
from pyqemb.data.arguments import checked
from pyqemb.data.columns import Columns
from pyqemb.data.splits import canonical, choose
from pyqemb.errors import ConfigError
from pyqemb.evaluation.reranking import METRICS, read_ranked_examples
from pyqemb.evaluation.run import evaluate, metric_names
from pyqemb.evaluation.tasks import Retrieval, Task, is_folder, load_task
from pyqemb.model.protocols import PairScorer, VectorEncoder


@dataclass(frozen=True)
class _Dataset:
    name: str
    source: Any  # as in `evaluate`
    split: str | None
    instruction: str | None
    metrics: tuple[str, ...]
    queries_have_instructions: bool
    size: str


class DevSets:
    """A function that evaluates a model on several datasets and returns {metric: value}.

    The metrics of eval.data are named like `ndcg@10`. Those of datasets with names are named like `NAME/ndcg@10`; of
    several datasets, `ndcg@10` is the mean. With one dataset, `ndcg@10` is reported only if `section.metric` names it.

    Args:
        section: the `eval` section of a TrainConfig; its datasets are read and checked here.
        task: "embedding" or "rerank".
        datasets: a dataset, or {name: dataset}, instead of those of the section. A dataset is any `folder` of
            `evaluate`, or a dict with it as `path` or `rows`, and with `split`, `columns` and `instruction`.

    `metric_names` lists the metrics that a call returns; training checks eval.metric against it. `needs_instruction`
    says whether some queries use the model's own prompt. `summary` has a line for each dataset.

    Raises:
        ConfigError: a split of a file of examples, or datasets both in the section and in `datasets`.
        DataError: a dataset cannot be read.

    Example:
        >>> config = pyqemb.training.load_config("run.toml")                         # doctest: +SKIP
        >>> pyqemb.train(config, evaluate=DevSets(config.eval, config.task))         # doctest: +SKIP
    """

    @checked
    def __init__(self, section: Any, task: Literal["embedding", "rerank"] = "embedding", datasets: Any = None):
        if not hasattr(section, "has_data"):
            raise TypeError(f"[DevSets] section must be that of a TrainConfig, eval, got {type(section).__name__}")
        given, self._named = _of_section(section), bool(section.datasets)
        if datasets is not None:
            if section.has_data:
                raise ConfigError("eval: has datasets, and evaluate=... is given too; give one of them")
            if isinstance(datasets, Mapping) and not datasets:
                raise ConfigError("evaluate: expected at least one dataset")
            self._named = isinstance(datasets, Mapping) and not _is_entry(datasets)
            by_name = datasets if self._named else {"evaluate": datasets}
            given = [_of_mapping(name, dataset) for name, dataset in by_name.items()]
        self._datasets = [_read(name, entry, section.instruction, task) for name, entry in given]
        self.metric_names = tuple(self._names(section.metric))
        self.summary = [f"{dataset.name}: {dataset.size}" for dataset in self._datasets]
        self.needs_instruction = any(
            dataset.instruction is None and not dataset.queries_have_instructions for dataset in self._datasets
        )

    def __call__(self, model: VectorEncoder | PairScorer) -> dict[str, float]:
        """Evaluate the model on every dataset."""
        reports = {}
        for dataset in self._datasets:
            report = evaluate(model, dataset.source, instruction=dataset.instruction, split=dataset.split, bootstrap=0)
            reports[dataset.name] = {name: value["value"] for name, value in report["metrics"].items()}
        if not self._named:
            return next(iter(reports.values()))
        values = {f"{name}/{metric}": value for name, report in reports.items() for metric, value in report.items()}
        return {name: _value(name, values, reports) for name in self.metric_names}

    def _names(self, metric: str | None) -> Sequence[str]:
        if not self._named:
            return self._datasets[0].metrics
        shared = [name for name in self._datasets[0].metrics if all(name in d.metrics for d in self._datasets)]
        if len(self._datasets) == 1:  # its mean would repeat every value
            shared = [name for name in shared if name == metric]
        return [*shared, *(f"{dataset.name}/{name}" for dataset in self._datasets for name in dataset.metrics)]


def _value(name: str, values: Mapping[str, float], reports: Mapping[str, Mapping[str, float]]) -> float:
    return values[name] if name in values else statistics.fmean(report[name] for report in reports.values())


@dataclass(frozen=True)
class _Entry:
    """An evaluation dataset, with the keys of [[eval.datasets]]; `rows` are in memory."""

    path: Any = None
    rows: Any = None
    split: str | None = None
    columns: Columns | None = None
    instruction: str | None = None


def _of_section(section: Any) -> list[tuple[str, _Entry]]:
    if not section.datasets:
        return [(_name_of(section.data or ""), _Entry(section.data))]
    return [
        (each.name or _name_of(each.path), _Entry(each.path, None, each.split, each.columns, each.instruction))
        for each in section.datasets
    ]


def _name_of(path: str) -> str:
    return Path(path).name.split(".")[0]


def _is_entry(dataset: Any) -> bool:
    return isinstance(dataset, dict) and bool({"path", "rows"} & dataset.keys())


def _of_mapping(name: str, dataset: Any) -> tuple[str, _Entry]:
    if not _is_entry(dataset):
        return name, _Entry(dataset)
    known = [field.name for field in fields(_Entry)]
    if unknown := sorted(set(dataset) - set(known)):
        raise ConfigError(f"evaluate: {name!r}: unknown key {unknown[0]!r}; expected some of {', '.join(known)}")
    if {"path", "rows"} <= dataset.keys():
        raise ConfigError(f"evaluate: {name!r}: path and rows exclude each other")
    return name, _Entry(**dataset)


def _read(name: str, entry: _Entry, instruction: str | None, task: str) -> _Dataset:
    """Read a dataset, so that errors in it are reported before training.

    Folders are read again for each evaluation; other data stay in memory.
    """
    source, split = entry.path if entry.rows is None else entry.rows, entry.split
    own = entry.instruction if entry.instruction is not None else instruction
    if task == "rerank":
        if split is not None and isinstance(source, str) and Path(source).is_file():
            raise ConfigError(f"eval: {source!r} is a file of examples, which has no split {split!r}")
        examples = read_ranked_examples(source, split, entry.columns, name)
        all_have_one = all(e.instruction is not None for e in examples)
        return _Dataset(name, examples, None, own, METRICS, all_have_one, f"{len(examples)} queries")
    if not is_folder(source):
        source, split = load_task(source, split, entry.columns, name), None
    elif split is None and beir.is_beir(Path(source)):
        names = beir.splits(Path(source))
        split = choose(Path(source), names, "dev" if canonical("dev") in map(canonical, names) else None, "test")
    found = load_task(source, split, entry.columns)
    all_have_one = isinstance(found, Retrieval) and set(found.queries) <= set(found.instructions)
    return _Dataset(name, source, split, own, metric_names(found), all_have_one, _size(found))


def _size(task: Task) -> str:
    if isinstance(task, Retrieval):
        return f"{len(task.queries)} queries, {len(task.corpus)} documents"
    return f"{len(task.first)} pairs"
