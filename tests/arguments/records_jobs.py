"""Records of the jobs: train, sweep, merge, mine, curate, synthesize, encode."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arguments_harness import Named
from arguments_place import (
    BAD_COLUMNS,
    BAD_ROWS,
    DATA,
    DTYPES,
    EXAMPLES,
    FOLDERS,
    NO_FOLDER,
    NO_MODELS,
    PLAIN,
    Place,
    Records,
    like,
    options,
    some,
)

import pyqemb
from pyqemb.curation import consistency, distinct, mine_task, plan_mine, similarity
from pyqemb.encoding import encode_file, plan_encode
from pyqemb.synthesis import SynthesisConfig


class Stream:
    """An iterable without a length, again and again."""

    def __init__(self, items: list[Any]):
        self.items = items

    def __iter__(self) -> Any:
        return iter(self.items)


def without_server(function: Callable[..., Any]) -> Callable[..., Any]:
    """A synthesis whose valid call ends at the server that does not exist."""

    def call(config: Any, **given: Any) -> Any:
        if isinstance(config, SynthesisConfig) and not given:
            return None
        return function(config, **given)

    return like(function, call)


def add(records: Records, place: Place) -> None:
    record = records.record
    embedder = place.embedder
    record(
        "pyqemb.train",
        pyqemb.train,
        lambda r: dict(config=place.config(place.new()), data=PLAIN, progress="off") | options(r, callbacks=[]),
        dict(
            config=["no-such.toml", Path("x.ini"), place.file, place.folder],
            data=[value for value in BAD_ROWS if not callable(value)],
            evaluate=[
                5,
                [5],
                {},
                {"a": 5},
                "no-such-folder",
                [],
                {"a": {"path": "no-such"}},
                {"a": {"what": 1}},
                {"a": {"path": "p", "rows": []}},
            ],
            resume=["no-such-folder", Path("no-such-folder")],
        ),
        names=dict(
            config=r"\bconfig\b|no-such|x\.ini|pairs|expected a .toml|at-all|folder",
            data=f"{DATA}|dataset",
            evaluate=r"\beval(uate)?\b|no such|no-such|at-all|^a: expected",
            resume=r"\bresume\b|no-such|at-all",
        ),
        fine=dict(evaluate=lambda value: callable(value) or (isinstance(value, str) and not value)),
        cheap=False,
    )
    record(
        "pyqemb.sweep",
        pyqemb.sweep,
        lambda r: dict(
            config=place.config(place.new()), over={"train.seed": [r.randrange(9)]}, data=PLAIN, evaluate=PLAIN,
            progress="off",
        ),
        dict(
            config=["no-such.toml", Path("x.ini"), place.file, place.folder],
            over=[{}, {"what.x": [1]}, {"train.steps": []}, {"train.steps": [0]}],
            overrides=[["train.steps"], ["what.x=1"]],
            task=[1, 5],
        ),
        names=dict(
            config=r"\bconfig\b|no-such|x\.ini|pairs|expected a .toml|at-all|folder", over=r"\bover\b|what|steps",
            overrides=r"\boverrides\b|steps|what",
        ),
        free=dict(data="as of train", evaluate="as of train"),
        cheap=False,
    )  # fmt: skip
    record(
        "pyqemb.consolidate",
        pyqemb.consolidate,
        lambda r: dict(run=place.run, out=place.new()),
        dict(run=FOLDERS, step=[99], out=[place.model, place.file]),
        names=dict(run=rf"\brun\b|{NO_FOLDER}|checkpoint", step=r"\bstep", out=r"\bout\b"),
        cheap=False,
        fine=dict(out=[None, "text", "\0"], step=[1]),
    )
    both = [place.model, place.folder / "other"]
    record(
        "pyqemb.merge",
        pyqemb.merge,
        lambda r: (
            dict(checkpoints=both, out=place.new())
            | options(
                r, method=some(r, "slerp", "linear", "karcher"), weights=[2, 1], settings_from=both[0], base=both[0]
            )
        ),
        dict(
            checkpoints=[
                [],
                [place.model],
                [place.model, "no-such"],
                [place.model, place.saved_reranker],
                [place.model, 5],
            ],
            method=["mean", ""],
            weights=[[1], [1, 2, 3], [0, 0], [-1, 2], [math.nan, 1], ["a", 1], [True, 1]],
            base=["no-such", place.saved_reranker],
            out=[place.model, place.file],
            settings_from=["no-such", place.run],
        ),
        names=dict(
            checkpoints=rf"\bcheckpoints\b|{NO_FOLDER}|reranker",
            base=rf"\bbase\b|{NO_FOLDER}|reranker",
            out=r"\bout\b|exists|refus|folder|at-all|\bpairs",
        ),
        cheap=False,
        fine=dict(out=["text", "\0"]),
    )
    record(
        "pyqemb.mine",
        pyqemb.mine,
        lambda r: (
            dict(model=embedder, examples=some(r, PLAIN, EXAMPLES))
            | options(
                r,
                corpus=["more"],
                k=r.randint(1, 3),
                margin=0.1,
                max_score=0.9,
                mean_margin=0.1,
                skip_top=r.randint(0, 2),
                depth=r.randint(9, 20),
                sampling=some(r, "top", "random", "softmax"),
                sampling_temperature=0.1,
                seed=r.randrange(9),
                instruction="task",
            )
        ),
        dict(
            model=NO_MODELS,
            examples=BAD_ROWS,
            columns=BAD_COLUMNS,
            k=[101],
            max_positive_ratio=[0, -1, 3],
            depth=lambda given: [given.get("k", 7) - 1],
            sampling_temperature=[0, -1],
            sampling=["best"],
            cache=[place.file],
            approximate=["no such index"],
            corpus=[["a", 5], Stream([5])],
        ),
        names=dict(examples=DATA, columns=r"\bcolumns?\b", cache=r"\bcache\b|pairs|at-all|text|null", k=r"\bk\b"),
        cheap=False,
        fine=dict(cache=["", "text", "\0"], approximate=[""], corpus=[None]),
    )
    curated = dict(input=[PLAIN], step=[{"kind": "exact"}])
    record(
        "pyqemb.curate",
        pyqemb.curate,
        lambda r: dict(config=dict(curated, out=some(r, str, Path)(place.new()))),
        dict(
            config=lambda given: [
                *(
                    Named({**given["config"], key: value}, key)
                    for key in ("input", "step", "out", "samples", "seed", "split", "columns")
                    for value in (0.5, [], object(), {"a": 5}, [5])
                    if (key, value) != ("input", [5])
                ),
                *(Named({**given["config"], "input": value}, "input") for value in (5, None, b"rows", {}, [None], int)),
                Named({**given["config"], "input": "no-such"}, "no-such"),
                Named({**given["config"], "samples": -1}, "samples"),
                Named({**given["config"], "what": 1}, "what"),
                Named({"input": [PLAIN]}, "out|step"),
                Named({**given["config"], "step": [{"kind": "none"}]}, "step"),
                Named({**given["config"], "step": [{"kind": "similarity", "model": 5}]}, "model"),
                Named({**given["config"], "step": [{"kind": "length", "min_characters": -5}]}, "min_characters|step"),
            ]
        ),
        names=dict(config=r"\bconfig\b|missing|input|out|step"),
        cheap=False,
    )
    record(
        "pyqemb.synthesize",
        pyqemb.synthesize,
        lambda r: dict(config=SynthesisConfig(passages=place.file, out=place.new(), endpoint={"model": "m"})),
        dict(
            config=[
                Named({"passages": "p"}, "out|endpoint"),
                Named({"passages": "p", "out": "o", "endpoint": {}}, "model"),
                Named({"passages": "no-such", "out": str(place.out / "o"), "endpoint": {"model": "m"}}, "no-such"),
                Named({"passages": 5, "out": "o", "endpoint": {"model": "m"}}, "passages"),
                Named({"passages": "p", "out": "o", "endpoint": {"model": "m"}, "tasks": {"x": 1}}, "tasks"),
            ]
        ),
        names=dict(config=r"\bconfig\b|missing"),
        cheap=False,
    )
    records["pyqemb.synthesize"].call = without_server(pyqemb.synthesize)
    wrong = dict(
        model=FOLDERS,
        path=["no-such", place.folder, place.model / "config.json"],
        out=["a.txt", place.folder, "a"],
        instruction=["task"],
        field=["absent"],
        dim=[33],
        dtype=DTYPES[:4],
        devices=[[], ["gpu?"], ["cpu", ""]],
    )
    path = r"\bpath\b|no such|unknown format|at-all|expected a text|json:1"
    names = dict(
        model=rf"\bmodel\b|{NO_FOLDER}",
        path=path,
        out=r"\bout\b|expected a name",
        devices=r"\bdevices?\b",
        field=r"\bfield\b|'absent'",
    )
    fine = dict(field=lambda value: isinstance(value, str))
    record(
        "encoding.encode_file",
        encode_file,
        lambda r: (
            dict(model=place.model, path=place.texts, out=place.new(".npy"))
            | options(
                r,
                dim=r.randint(1, 32),
                precision=some(r, "float32", "binary"),
                max_length=r.randint(2, 9),
                rows_per_part=r.randint(1, 9),
                devices=["cpu"],
            )
            | r.choice([{}, dict(tasks=2, task=1)])
        ),
        wrong | dict(tasks=[0, 1.5, "auto"], task=[-1, 2, "1"]),
        names=names,
        fine=fine,
        cheap=False,
    )
    record(
        "encoding.plan_encode",
        plan_encode,
        lambda r: (
            dict(model=place.model, path=place.texts, out=place.new(".npy"))
            | options(r, dim=r.randint(1, 32), rows_per_part=r.randint(1, 9), devices=["cpu"], tasks=2, seconds=0.01)
        ),
        wrong | dict(seconds=[0, -1]),
        names=names | dict(path=rf"{path}|is a folder"),
        fine=fine,
        cheap=False,
    )
    record(
        "curation.mine_task",
        mine_task,
        lambda r: (
            dict(model=place.model, examples=place.file, out=place.new(".jsonl"))
            | dict(zip(("tasks", "task"), r.choice([(1, 0), (2, 1)]), strict=True))
            | options(r, k=2, depth=9, skip_top=1, seed=3, margin=0.1, instruction="task", corpus=place.file)
        ),
        dict(
            model=FOLDERS,
            examples=["no-such", "hub://a/b", place.model / "config.json"],
            out=["a.csv", place.file],
            tasks=[0, 1.5, "auto"],
            task=[-1, 2, "1"],
            corpus=["no-such"],
            columns=BAD_COLUMNS,
            max_positive_ratio=[0, 3],
            depth=lambda given: [given.get("k", 7) - 1],
            sampling_temperature=[0, -1],
            sampling=["best"],
            split=["absent"],
        ),
        names=dict(
            model=rf"\bmodel\b|{NO_FOLDER}",
            examples=rf"\bexamples\b|{DATA}|hub|json:1",
            out=r"\bout\b|expected a name|a\.csv",
            corpus=r"\bcorpus\b|no such",
            columns=r"column|absent|what",
            split=r"\bsplits?\b|absent",
        ),
        cheap=False,
    )

    record(
        "curation.plan_mine",
        plan_mine,
        lambda r: (
            dict(model=place.model, examples=place.file, out=place.new(".jsonl"))
            | options(r, depth=9, skip_top=1, instruction="task", corpus=place.file, tasks=2, seconds=0.01)
        ),
        dict(
            model=FOLDERS,
            examples=["no-such", "hub://a/b", place.model / "config.json"],
            out=["a.csv"],
            corpus=["no-such"],
            columns=BAD_COLUMNS,
            split=["absent"],
            seconds=[0, -1],
        ),
        names=dict(
            model=rf"\bmodel\b|{NO_FOLDER}",
            examples=rf"\bexamples\b|{DATA}|hub|json:1",
            out=r"\bout\b|expected a name|a\.csv",
            corpus=r"\bcorpus\b|no such",
            columns=r"column|absent|what",
            split=r"\bsplits?\b|absent",
        ),
        cheap=False,
    )

    def parts() -> Path:
        out: Path = place.new(".npy")
        encode_file(place.model, place.texts, out, devices=["cpu"], tasks=1, task=0)
        return out

    record(
        "pyqemb.finish",
        pyqemb.finish,
        lambda r: dict(out=parts()),
        dict(out=["no-such", place.folder, place.texts]),
        names=dict(out=r"\bout\b|no such folder|root of the file system"),
        cheap=False,
    )
    filtering = lambda r: dict(model=embedder, examples=EXAMPLES[:4]) | options(r, instruction="task")  # noqa: E731
    bad_examples = [[5], [None], [*EXAMPLES, {}], [{"query": "q", "positive": "p"}]]
    record(
        "curation.consistency",
        consistency,
        lambda r: filtering(r) | options(r, top=r.randint(1, 3), pool=["more"]),
        dict(model=NO_MODELS, examples=bad_examples, pool=[["a", 5]]),
        cheap=False,
    )
    record(
        "curation.similarity",
        similarity,
        lambda r: filtering(r) | options(r, min_sim=0.1, max_sim=0.9),
        dict(model=NO_MODELS, examples=bad_examples, max_sim=lambda given: [given.get("min_sim", 0.7) - 0.1]),
        cheap=False,
    )
    record("curation.distinct", distinct, lambda r: dict(examples=EXAMPLES[:4]), dict(examples=bad_examples))
