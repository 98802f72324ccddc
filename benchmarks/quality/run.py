"""Retrieval quality of pyqemb against sentence-transformers: equal data, model and CPU time, on one thread.

    python benchmarks/quality/run.py --seconds 45 --sets help,code --starts scratch --seeds 3 -o results.json

For each set and start, loss, learning rate and batch size of each trainer are searched on the dev task with the same
rule; then each trains with its best recipe from `--seeds` seeds, and is measured on the test task. A finished cell is
not run again. `report.py` makes the page from the results. Sets that the machine lacks are skipped by name.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from results import NDCG, Cell, Results, environment, scored
from starts import STARTS, Start, from_scratch, smollm2
from tasks import Task, load, names
from trainers import TRAINERS, Recipe, Trainer

from pyqemb.demo.bm25 import bm25_ranking
from pyqemb.errors import DataError
from pyqemb.evaluation import score_rankings

MIN_BATCH, MAX_BATCH = 8, 2048
CALIBRATION = 4  # steps that measure the seconds of a step


class Comparison:
    """The cells of one set and start."""

    def __init__(self, task: Task, start: Start, results: Results, args: argparse.Namespace):
        self.task, self.start, self.results, self.args = task, start, results, args

    def run(self) -> None:
        self.results.cell(f"{self.task.name} | bm25", self._bm25)
        best = {trainer.name: self.search(trainer) for trainer in TRAINERS}
        for seed in range(self.args.seeds):
            for trainer in TRAINERS:  # in turn, so that they meet the same load
                name = f"{self._name(trainer)} | final | {seed}"
                self.results.cell(name, lambda t=trainer, s=seed: self.trained(t, best[t.name], s, final=True))

    def search(self, trainer: Trainer) -> Recipe:
        """The best recipe on the dev task: first the learning rate, in factors of 2 as long as it gets better; then the
        loss; then the batch size, and factors of 4 from the best.
        """
        batches = self.start.batches
        best = Recipe(trainer.losses[0], batches[len(batches) // 2], self.start.rate)
        best = self._climbed(trainer, best, lambda recipe, step: replace(recipe, rate=recipe.rate * 2.0**step))
        best = self._best_of(trainer, [replace(best, loss=loss) for loss in trainer.losses])
        if len(batches) > 1:
            best = self._best_of(trainer, [replace(best, batch=batch) for batch in batches])
            best = self._climbed(
                trainer, best, lambda recipe, step: replace(recipe, batch=int(recipe.batch * 4.0**step))
            )
        return best

    def _best_of(self, trainer: Trainer, recipes: Sequence[Recipe]) -> Recipe:
        return max(recipes, key=lambda recipe: self._dev(trainer, recipe))

    def _climbed(self, trainer: Trainer, best: Recipe, moved: Callable[[Recipe, int], Recipe]) -> Recipe:
        """The best recipe in steps up or down from `best`, as far as each step is better than the one before."""
        for step in (1, -1):
            while MIN_BATCH <= moved(best, step).batch <= MAX_BATCH and best != (
                further := self._best_of(trainer, [best, moved(best, step)])
            ):
                best = further
        return best

    def _dev(self, trainer: Trainer, recipe: Recipe) -> float:
        name = self._search_name(trainer, recipe)
        return self.results.cell(name, lambda: self.trained(trainer, recipe, 0, final=False))[NDCG]

    def _search_name(self, trainer: Trainer, recipe: Recipe) -> str:
        return f"{self._name(trainer)} | search | {recipe.loss} | {recipe.batch} | {recipe.rate:g}"

    def trained(self, trainer: Trainer, recipe: Recipe, seed: int, *, final: bool) -> Cell:
        """A model trained for the CPU seconds of the search or of a final run, and measured."""
        seconds = self.args.seconds if final else self.args.search_seconds
        first, per_step = self.pace(trainer, recipe)
        if final:  # the run of the search was longer than the calibration
            per_step = recipe.batch / self.results.cells[self._search_name(trainer, recipe)]["pairs/s"]
        steps = max(round((seconds - first) / per_step) + 1, 2)
        with tempfile.TemporaryDirectory() as out:
            model, clock = trainer.train(
                self.base(seed), self.task.train, recipe, self.start, steps=steps, seed=seed, out=Path(out)
            )
            measured = scored(model, self.task.test if final else self.task.dev, values=final)
        return {
            "loss": recipe.loss, "batch": recipe.batch, "rate": recipe.rate, "steps": steps,
            "seconds": round(clock.ends[-1], 1), "pairs/s": round(recipe.batch / clock.per_step, 1), **measured,
        }  # fmt: skip

    def pace(self, trainer: Trainer, recipe: Recipe) -> tuple[float, float]:
        """CPU seconds until the end of the first step, and of each later step."""

        def calibrate() -> Cell:
            with tempfile.TemporaryDirectory() as out:
                _, clock = trainer.train(
                    self.base(0), self.task.train, recipe, self.start, steps=CALIBRATION, seed=0, out=Path(out)
                )
            return {"first": round(clock.ends[0], 3), "per step": round(clock.per_step, 4)}

        cell = self.results.cell(f"{self._name(trainer)} | pace | {recipe.loss} | {recipe.batch}", calibrate)
        return cell["first"], cell["per step"]

    def base(self, seed: int) -> Path:
        """The folder of the model to start from; only weights from scratch depend on the seed."""
        folder = self.args.work / self.start.name
        if self.start.name == "scratch":
            return from_scratch(folder / f"{self.task.name}-{seed}", self.task.train, seed=seed)
        return smollm2(folder, max_length=self.start.max_length)

    def _bm25(self) -> Cell:
        task, documents = self.task.test, list(self.task.test.corpus)
        found = bm25_ranking(list(task.queries.values()), list(task.corpus.values()), 100)
        rankings = {q: [documents[i] for i in row if i >= 0] for q, row in zip(task.queries, found, strict=True)}
        values = list(score_rankings(rankings, task.qrels)[NDCG].values())
        return {NDCG: round(sum(values) / len(values), 4), "documents": len(documents), "pairs": len(self.task.train)}

    def _name(self, trainer: Trainer) -> str:
        return f"{self.task.name} | {self.start.name} | {trainer.name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45, help="CPU seconds of a final run")
    parser.add_argument("--search-seconds", type=float, help="CPU seconds of a run of the search (default: a third)")
    parser.add_argument("--sets", default=",".join(names()), help="sets, separated by commas")
    parser.add_argument("--starts", default="scratch", help=f"of {', '.join(STARTS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="folder of the sets that are files")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "pyqemb-quality", help="for models")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the results file")
    args = parser.parse_args()
    args.search_seconds = args.search_seconds or args.seconds / 3
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("start it with OMP_NUM_THREADS=1, which both trainers follow")
    torch.set_num_threads(1)
    results = Results(args.out)
    results.content.setdefault("environment", environment())
    results.content.setdefault("skipped", [])
    for name in args.sets.split(","):
        try:
            task = load(name, args.data)
        except DataError as error:
            print(f"skipped: {error}", flush=True)
            results.content["skipped"] = sorted({*results.content["skipped"], name})
            continue
        results.content["skipped"] = [each for each in results.content["skipped"] if each != name]
        for start in args.starts.split(","):
            Comparison(task, STARTS[start], results, args).run()
    results.save()


if __name__ == "__main__":
    main()
