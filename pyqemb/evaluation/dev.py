"""Measuring while training.

The datasets of the [eval] section become a function of the model; they are checked before the first step.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyqemb.data import beir
from pyqemb.data.splits import canonical, choose
from pyqemb.errors import ConfigError
from pyqemb.evaluation.reranking import METRICS, read_ranked_examples
from pyqemb.evaluation.run import evaluate, metric_names
from pyqemb.evaluation.tasks import Retrieval, load_task
from pyqemb.model.protocols import PairScorer, VectorEncoder


@dataclass(frozen=True)
class _Dataset:
    name: str
    path: str
    split: str | None
    instruction: str | None
    metrics: tuple[str, ...]
    queries_have_instructions: bool


class DevSets:
    """A function of a model that measures it on the datasets of the [eval] section: {metric: value}.

    The metrics of eval.data are named like `ndcg@10`. Those of eval.datasets are named like `NAME/ndcg@10`, and
    `ndcg@10` is their mean.

    Args:
        section: the `eval` section of a TrainConfig; its datasets are read and checked here.
        task: "embedding" or "rerank".

    `metric_names` lists what a call returns; training checks eval.metric against it. `needs_instruction` says whether
    some queries are measured with the model's own prompt.

    Raises:
        ConfigError: a file of examples is given a split.
        DataError: a dataset cannot be read.

    Example:
        >>> config = pyqemb.training.load_config("run.toml")                         # doctest: +SKIP
        >>> pyqemb.train(config, evaluate=DevSets(config.eval, config.task))         # doctest: +SKIP
    """

    def __init__(self, section: Any, task: str = "embedding"):
        self._named = bool(section.datasets)
        given = section.datasets or [section]
        self._datasets = [_read(entry, section.instruction, task) for entry in given]
        self.metric_names = tuple(self._names())
        self.needs_instruction = any(
            dataset.instruction is None and not dataset.queries_have_instructions for dataset in self._datasets
        )

    def __call__(self, model: VectorEncoder | PairScorer) -> dict[str, float]:
        """Measure the model on every dataset."""
        reports = {}
        for dataset in self._datasets:
            report = evaluate(model, dataset.path, instruction=dataset.instruction, split=dataset.split, bootstrap=0)
            reports[dataset.name] = {name: value["value"] for name, value in report["metrics"].items()}
        if not self._named:
            return next(iter(reports.values()))
        values = {f"{name}/{metric}": value for name, report in reports.items() for metric, value in report.items()}
        return {name: _value(name, values, reports) for name in self.metric_names}

    def _names(self) -> Sequence[str]:
        if not self._named:
            return self._datasets[0].metrics
        shared = [name for name in self._datasets[0].metrics if all(name in d.metrics for d in self._datasets)]
        return [*shared, *(f"{dataset.name}/{name}" for dataset in self._datasets for name in dataset.metrics)]


def _value(name: str, values: Mapping[str, float], reports: Mapping[str, Mapping[str, float]]) -> float:
    return values[name] if name in values else statistics.fmean(report[name] for report in reports.values())


def _read(entry: Any, instruction: str | None, task: str) -> _Dataset:
    """Read a dataset once, so that what is wrong with it shows before training."""
    path = entry.data if hasattr(entry, "data") else entry.path
    name = getattr(entry, "name", None) or Path(path).name.split(".")[0]
    split = getattr(entry, "split", None)
    own = entry.instruction if entry.instruction is not None else instruction
    if task == "rerank":
        if split is not None:
            raise ConfigError(f"eval: {path!r} is a file of examples, which has no split {split!r}")
        examples = read_ranked_examples(path)
        return _Dataset(name, path, None, own, METRICS, all(e.instruction is not None for e in examples))
    if split is None and Path(path).is_dir() and beir.is_beir(Path(path)):
        names = beir.splits(Path(path))
        split = choose(Path(path), names, "dev" if canonical("dev") in map(canonical, names) else None, "test")
    found = load_task(path, split)
    all_have_one = isinstance(found, Retrieval) and set(found.queries) <= set(found.instructions)
    return _Dataset(name, path, split, own, metric_names(found), all_have_one)
