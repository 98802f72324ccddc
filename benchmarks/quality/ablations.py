"""Which settings of a training run matter: one change at a time, five seeds, intervals over seeds and queries.

    python benchmarks/quality/ablations.py -o ablations.json [--only merging] [--seeds 5] [--teacher FOLDER]

Models from scratch (two layers of 128 features) learn to find the English paragraph of the LibreOffice help for its
translations; the experiment `titles` asks with titles. A finished cell is not run again. `report.py` makes the page.
"""

import argparse
import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from results import Cell, Results, environment, scored
from starts import from_scratch
from tasks import load, part_of, retrieval

from pyqemb import Embedder, merge, mine
from pyqemb.data.example import Example
from pyqemb.demo.help_data import load_rows, weak_pairs
from pyqemb.demo.material import untouched
from pyqemb.evaluation import Retrieval
from pyqemb.training import stage2, train

STEPS, BATCH, RATE, LENGTH = 40, 256, 2e-3, 32
BASE = "base"
TRAIN = {
    "steps": STEPS, "global_batch_size": BATCH, "num_negatives": 0, "learning_rate": RATE, "schedule": "linear",
    "betas": (0.9, 0.95), "tokens_per_chunk": 8192, "log_every": 10**6,
}  # fmt: skip
RUNS = 5  # that are merged


@dataclass(frozen=True)
class Variant:
    """One run: changes to the base run.

    `start` is a variant whose model it continues, `guide` one whose model masks false negatives; `data` are kinds of
    pairs (`Lab.data`) with sampling weights; `teacher` are settings of the section, with the model of --teacher.
    """

    name: str
    train: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    data: tuple[tuple[str, float | None], ...] = (("pairs", None),)
    start: str | None = None
    guide: str | None = None
    teacher: dict[str, Any] | None = None
    pooling: str = "mean"
    asks: str = "translations"


def one(kind: str) -> tuple[tuple[str, float | None], ...]:
    return ((kind, None),)


def experiments() -> dict[str, list[Variant]]:
    """The variants of each experiment; the first is what the others are compared with."""
    base = Variant(BASE)
    mixed = (("translations", None), ("titles", None))
    first = Variant("titles: stage 1", data=one("weak"), loss={"temperature": 0.1})

    def titles(name: str, data: Any = mixed, **changes: Any) -> Variant:
        return Variant(f"titles: {name}", data=data, asks="titles", **changes)

    def batch(size: int, steps: int, rate: float) -> Variant:
        return Variant(
            f"batch {size}, {steps} steps, rate {rate:.2g}",
            train={"global_batch_size": size, "steps": steps, "learning_rate": rate},
        )

    def taught(name: str, **changes: Any) -> Variant:
        return titles(f"four times the steps, {name}", one("titles"), train={"steps": 4 * STEPS}, **changes)

    pairs = 16_384
    return {
        "hard negatives": [
            base,
            Variant("1 hard negative", {"num_negatives": 1}, data=one("pairs, mined")),
            Variant("3 hard negatives", {"num_negatives": 3}, data=one("pairs, mined")),
            Variant("1 hard negative, margin null", {"num_negatives": 1}, {"margin": None}, data=one("pairs, mined")),
            Variant("1 hard negative, mined without a limit", {"num_negatives": 1}, data=one("pairs, mined, no limit")),
        ],
        "margin": [base, *(Variant(f"margin {value}", loss={"margin": value}) for value in (None, 0.0, 0.3))],
        "temperature": [
            base, *(Variant(f"temperature {t}", loss={"temperature": t}) for t in (0.01, 0.02, 0.1, 0.2)),
        ],
        "mask and pooling": [
            base,
            Variant("bidirectional, last", pooling="last"),
            Variant("causal, mean", model={"is_causal": True}),
            Variant("causal, last", model={"is_causal": True}, pooling="last"),
        ],
        "scarce pairs": [
            Variant("stage 1", data=one("weak"), loss={"temperature": 0.1}),
            *(
                Variant(f"{count} pairs, {text}", data=one(str(count)), start=start)
                for count in (1000, 5000, 40_000)
                for start, text in ((None, "stage 2 alone"), ("stage 1", "stage 1 + 2"))
            ),
        ],
        "titles": [
            titles("both tasks"),
            titles("titles alone", one("titles")),
            titles("half of the batches titles", (("translations", 1.0), ("titles", 1.0))),
            titles("both tasks, 1 mined negative", (("translations", None), ("titles, mined", None)),
                   train={"num_negatives": 1}),
            titles("both tasks, three times the steps", train={"steps": 3 * STEPS}),
            replace(first, asks="titles"),
            titles("both tasks after stage 1", start=first.name),
            titles("half titles after stage 1", (("translations", 1.0), ("titles", 1.0)), start=first.name),
        ],
        "presets": [
            base, *(Variant(f"preset {name}", loss={"preset": name}) for name in ("qwen3_stage2", "mnrl", "gte")),
        ],
        "pieces of the objective": [
            base,
            *(Variant(f"tau_plus {value}", loss={"tau_plus": value}) for value in (0.0001, 0.001, 0.01)),
            Variant("focal 0.5", loss={"focal": 0.5}),
            Variant("spread_out 1", loss={"spread_out": 1.0}),
            Variant("a guide (the base run), no margin", loss={"margin": None}, guide=BASE),
            Variant("a guide (the base run) and the margin", guide=BASE),
        ],
        "optimizer": [
            base,
            Variant("Muon", {"optimizer": "muon"}),
            Variant("Muon, rate 4e-3", {"optimizer": "muon", "learning_rate": 2 * RATE}),
            Variant("average of the weights, decay 0.9", {"ema_decay": 0.9}),
            Variant("layer_decay 0.8", {"layer_decay": 0.8}),
            *(Variant(f"rate {rate:g}", {"learning_rate": rate}) for rate in (RATE / 2, 2 * RATE)),
        ],
        "teacher": [
            taught("no teacher"),
            *(
                taught(f"a teacher of weight {weight:g}", teacher={"weight": weight})
                for weight in (3.0, 10.0, 30.0, 100.0)
            ),
            taught("a teacher by mean squared error", teacher={"cosine": 0.0, "mse": 4000.0}),
        ],
        "batch size, equal pairs": [
            batch(size, pairs // size, RATE * (size / BATCH) ** 0.5)
            for size in (256, 64, 128, 512, 1024, 2048, 4096)
        ],
        "batch size, equal steps": [batch(size, STEPS, RATE) for size in (256, 64, 128, 512, 1024)],
    }  # fmt: skip


class Lab:
    """Data, models and results."""

    def __init__(self, results: Results, work: Path, teacher: Path | None = None):
        self.results, self.work, self.teacher = results, work, teacher
        self._data: dict[str, list[Example]] = {}
        self.task = load("help", None)
        test = self.task.test
        some = list(test.queries)[:500]
        self.tests = {
            "translations": Retrieval({q: test.queries[q] for q in some}, test.corpus, {q: test.qrels[q] for q in some})
        }
        rows = [*load_rows("train"), *load_rows("dev")]
        self.rows = [row for row in rows if part_of(row["page"]) == "train"]
        held_out = [row for row in rows if part_of(row["page"]) != "train"]
        self.tests["titles"] = retrieval(((row["title"], row["en"]) for row in held_out if row["title"]), 500, 3000)
        self.held_out = {
            text for row in held_out for key, text in row.items() if key != "page" and isinstance(text, str)
        }

    def data(self, kind: str) -> list[Example]:
        """The training pairs of that kind."""
        if kind not in self._data:
            self._data[kind] = untouched(self._made(kind), self.held_out)
        return self._data[kind]

    def _made(self, kind: str) -> Sequence[Example]:
        name, *mined = kind.split(", ")
        if mined:
            examples = self.data(name)
            ratio = None if "no limit" in mined else 0.95
            return mine(self.model(BASE, 0), examples, k=7, depth=50, max_positive_ratio=ratio).examples
        if name == "weak":
            pairs = weak_pairs(self.rows, seed=0)
            return random.Random(0).sample(pairs, len(pairs))
        if name == "titles":
            return [Example(row["title"], row["en"], task="title") for row in self.rows if row["title"]]
        if name == "translations":
            return self.task.train
        return self.task.train if name == "pairs" else self.task.train[: int(name)]

    def model(self, name: str, seed: int) -> Embedder:
        return Embedder.from_pretrained(self.work / "models" / f"{name}-{seed}" / "final")

    def run(self, variant: Variant, seed: int, *, data_seed: int | None = None) -> None:
        """Train and measure one seed of a variant, unless that is done."""
        name = variant.name if data_seed is None else f"{variant.name}, run {data_seed}"
        folder = self.work / "models" / f"{name}-{seed}"
        self.results.cell(
            f"{name} | {seed}", lambda: self._run(variant, seed, seed if data_seed is None else data_seed, folder)
        )

    def _run(self, variant: Variant, seed: int, data_seed: int, folder: Path) -> Cell:
        if variant.start is not None:
            base = self.work / "models" / f"{variant.start}-{seed}" / "final"
        else:
            settings = {**variant.model, "pooling": variant.pooling}
            kind = "-".join(str(value) for value in settings.values())
            base = from_scratch(
                self.work / f"scratch-{kind}-{seed}", self.task.train, seed=seed, max_length=LENGTH, **settings
            )
        config = stage2(
            model={"base": str(base), "max_length": LENGTH},
            data=[
                {"rows": self.data(kind), "name": kind.replace(", ", "-"), "weight": weight}
                for kind, weight in variant.data
            ],
            loss={"temperature": 0.05, **variant.loss},
            train={**TRAIN, **variant.train, "seed": data_seed},
            save={"dir": str(folder), "every": None},
            **self._others(variant, seed),
        )
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
        result = train(config, progress="off")
        model = Embedder.from_pretrained(result.folder)
        return scored(model, self.tests[variant.asks], values=True)

    def _others(self, variant: Variant, seed: int) -> dict[str, Any]:
        """The sections of the models besides the trained one."""
        found: dict[str, Any] = {}
        if variant.guide is not None:
            found["guide"] = {"model": str(self.work / "models" / f"{variant.guide}-{seed}" / "final")}
        if variant.teacher is not None:
            found["teacher"] = {"model": str(self.teacher), "cache": str(self.work / "teacher"), **variant.teacher}
        return found

    def merged(self, seed: int) -> None:
        """Runs that differ in the order of the data, from one start, and their merges."""
        run = Variant("continued", {"learning_rate": RATE / 2}, start=BASE)
        for number in range(RUNS):
            self.run(run, seed, data_seed=100 + number)
        folders = [self.work / "models" / f"continued, run {100 + i}-{seed}" / "final" for i in range(RUNS)]
        for method in ("slerp", "linear", "karcher"):
            for count in (2, 3, RUNS):

                def measure(method: str = method, count: int = count) -> Cell:
                    with tempfile.TemporaryDirectory() as out:
                        merge(folders[:count], method, out=Path(out) / "merged")
                        model = Embedder.from_pretrained(Path(out) / "merged")
                        return scored(model, self.tests["translations"], values=True)

                self.results.cell(f"{method} of {count} | {seed}", measure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the results file")
    parser.add_argument("--only", help="experiments, separated by semicolons (default: all)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "pyqemb-ablations", help="for models"
    )
    parser.add_argument("--teacher", type=Path, help="folder of all-MiniLM-L6-v2, for the experiment `teacher`")
    args = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("start it with OMP_NUM_THREADS=1")
    torch.set_num_threads(1)
    results = Results(args.out)
    results.content.setdefault("environment", environment())
    lab = Lab(results, args.work, args.teacher)
    names = [*experiments(), "merging"]
    wanted = args.only.split(";") if args.only else [name for name in names if name != "teacher" or args.teacher]
    if unknown := set(wanted) - set(names):
        parser.error(f"--only: {min(unknown)!r} is none of {', '.join(names)}")
    if "teacher" in wanted and args.teacher is None:
        parser.error("--only teacher needs --teacher")
    for seed in range(args.seeds):
        lab.run(Variant(BASE), seed)
    for name in wanted:
        for seed in range(args.seeds):
            if name == "merging":
                lab.merged(seed)
                continue
            for variant in experiments()[name]:
                lab.run(variant, seed)


if __name__ == "__main__":
    main()
