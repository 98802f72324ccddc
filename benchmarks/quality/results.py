"""The results file: one JSON object with a cell for each finished run, rewritten after each; and paired intervals."""

import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyqemb.data.files import atomic_file
from pyqemb.evaluation import Retrieval, evaluate
from pyqemb.evaluation.metrics import Interval
from pyqemb.model.protocols import VectorEncoder

Cell = dict[str, Any]
NDCG = "ndcg@10"


class Results:
    """The cells of a results file by name; a cell that is there is not run again."""

    def __init__(self, path: Path):
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cells": {}}

    @property
    def cells(self) -> dict[str, Cell]:
        return self.content["cells"]

    def cell(self, name: str, run: Callable[[], Cell]) -> Cell:
        """The cell of that name, run if it is missing."""
        if name not in self.cells:
            self.cells[name] = run()
            self.save()
            print(name, {key: value for key, value in self.cells[name].items() if key != "values"}, flush=True)
        return self.cells[name]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            f"  {json.dumps(name)}: {json.dumps(cell, separators=(',', ':'))}" for name, cell in self.cells.items()
        ]
        others = "".join(f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in self.content.items() if k != "cells")
        with atomic_file(self.path) as path:
            path.write_text("{\n" + others + ' "cells": {\n' + ",\n".join(lines) + "\n }\n}\n")


def environment() -> dict[str, Any]:
    """Versions, and what the figures depend on."""
    import sentence_transformers
    import transformers

    import pyqemb

    return {
        "machine": platform.processor() or platform.machine(), "python": platform.python_version(),
        "torch": torch.__version__, "sentence-transformers": sentence_transformers.__version__,
        "transformers": transformers.__version__, "pyqemb": pyqemb.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip


def scored(model: VectorEncoder, task: Retrieval, *, values: bool) -> Cell:
    """nDCG@10 of a model on a task, and of each query if `values`."""
    report = evaluate(model, task, bootstrap=0)
    found: Cell = {NDCG: round(report["metrics"][NDCG]["value"], 4)}
    if values:
        found["values"] = [round(value, 3) for value in report["per_query"][NDCG].values()]
    return found


def values_of(cells: Sequence[Cell]) -> np.ndarray:
    """nDCG@10 [seeds, queries] of the cells of several seeds."""
    return np.array([cell["values"] for cell in cells], dtype=np.float64)


def interval(values_SQ: np.ndarray, resamples: int = 2000) -> Interval:
    """The mean of values or of paired differences [seeds, queries], and its 95 % bootstrap interval.

    Seeds and queries are resampled independently, so the interval covers other seeds and other queries.
    """
    seeds, queries = values_SQ.shape
    generator = np.random.default_rng(0)
    means = np.empty(resamples)
    for i in range(resamples):
        weights_S = np.bincount(generator.integers(0, seeds, seeds), minlength=seeds) / seeds
        weights_Q = np.bincount(generator.integers(0, queries, queries), minlength=queries) / queries
        means[i] = weights_S @ values_SQ @ weights_Q
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values_SQ.mean()), float(low), float(high))
