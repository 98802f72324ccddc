"""Records of training: the gradient cache, configurations and objectives."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from arguments_harness import Named, settings_record
from arguments_place import BAD_BATCHES, HUGE, PLAIN, Place, Records, batch, options

import pyqemb
from pyqemb import training
from pyqemb.curation import CurateConfig
from pyqemb.data.batch import PackedBatch
from pyqemb.llm import Endpoint
from pyqemb.synthesis import SynthesisConfig
from pyqemb.training import config as training_config
from pyqemb.training.callbacks.base import StepFunction
from pyqemb.training.grad_cache import GradCache
from pyqemb.training.objectives.base import EmbeddingSection, LossParameters, Objective
from pyqemb.training.objectives.distillation import DistillationSection
from pyqemb.training.objectives.info_nce import GroupSection, InfoNCESection


class Own(Objective):
    """An objective of a user."""

    name = "own of the harness"

    def loss(self, batch, queries_BE, documents_ME, rows):
        raise NotImplementedError


def config_file(place: Place) -> Path:
    path = place.folder / "run.toml"
    if not path.exists():
        path.write_text('[model]\nbase = "b"\n[train]\nsteps = 2\n')
    return path


def curation_file(place: Place) -> Path:
    path = place.folder / "curate.toml"
    path.write_text('input = ["p"]\nout = "o"\nstep = [{kind = "exact"}]\n')
    return path


def one_section(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(sections: Any) -> Any:
        return function(**sections)

    return call


def add(records: Records, place: Place) -> None:
    record = records.record
    embedder = place.embedder
    queries, documents = PackedBatch.pack([[1, 2], [3]]), PackedBatch.pack([[4], [5, 6]])
    loss = lambda q, d: (q - d).square().mean()  # noqa: E731
    grad_cache = GradCache(embedder, loss)
    bad = [value for value in BAD_BATCHES if not isinstance(value, PackedBatch)]
    record(
        "pyqemb.GradCache.step",
        grad_cache.step,
        lambda r: dict(queries=queries, documents=documents) | options(r, scale=r.random()),
        dict(
            queries=[*bad, PackedBatch.pack([])],
            documents=[*bad, PackedBatch.pack([])],
            scale=["1", None, math.nan, math.inf, True, 1j, [], HUGE],
        ),
    )
    record(
        "pyqemb.GradCache.step_stream",
        grad_cache.step_stream,
        lambda r: dict(stream=queries, loss_of=torch.sum) | options(r, scale=r.random()),
        dict(stream=bad, loss_of=[None, 5, "loss", {}], scale=["1", None, math.nan, True, 1j, []]),
    )
    for name in ("forward", "planned", "preview"):
        record(f"pyqemb.GradCache.{name}", getattr(grad_cache, name), lambda r: dict(stream=batch(r)), dict(stream=bad))
    rec = grad_cache.forward(queries)
    record(
        "pyqemb.GradCache.backward",
        grad_cache.backward,
        lambda r: dict(record=grad_cache.forward(queries), gradient_SE=torch.ones(2, 32)),
        dict(
            record=[5, None, {}, rec.embeddings],
            gradient_SE=[
                5,
                None,
                [1.0],
                torch.ones(2, 31),
                torch.ones(32),
                torch.ones(2, 32, dtype=torch.int64),
                torch.ones(2, 32, device="meta"),
            ],
        ),
    )
    record("pyqemb.GradCache.discard", grad_cache.discard, lambda r: dict(record=grad_cache.forward(queries)))
    of_stage = training_config.ParallelSection(shard=2)
    record(
        "training.config.ParallelSection.mesh",
        of_stage.mesh,
        lambda r: dict(ranks=2 * r.randint(1, 3)),
        dict(ranks=[3, 0]),
    )
    record(
        "training.config.with_data",
        training_config.with_data,
        lambda r: dict(config=place.config(place.out / "never"), data=PLAIN),
        dict(data=[None, [], {}]),
        names=dict(data=r"\bdata\b"),
    )
    record("training.callbacks.base.StepFunction", StepFunction, lambda r: dict(on_step=print))
    record("training.objectives.base.LossParameters", LossParameters, lambda r: dict(section=EmbeddingSection()))
    record(
        "data.settings.Settings.from_file",
        CurateConfig.from_file,
        lambda r: dict(path=curation_file(place)) | options(r, overrides={"samples": 3}),
        dict(
            path=["no-such.toml", "x.ini", place.file],
            overrides=[Named({"samples": -1}, "samples"), Named({"what": 1}, "what")],
        ),
        names=dict(path=r"\bpath\b|no-such|x\.ini|expected a .toml|at-all|no such"),
        fine=dict(overrides=[{}]),
    )
    record(
        "training.load_config",
        training.load_config,
        lambda r: dict(path=config_file(place)) | options(r, overrides=["train.steps=3"]),
        dict(
            path=["no-such.toml", "x.ini", place.file, place.folder],
            overrides=[
                Named(["train.steps"], "train.steps"),
                Named(["train.steps=x"], "steps"),
                Named(["what.is=1"], "what"),
                Named(["=1"], "=1"),
                Named(["train.steps=["], "train.steps"),
                ["train.steps=3", 5],
            ],
        ),
        names=dict(path=r"\bpath\b|no-such|x\.ini|expected a .toml|at-all|no such"),
        fine=dict(overrides=[[], ()]),
    )
    for name in ("stage1", "stage2"):
        record(
            f"pyqemb.{name}",
            one_section(getattr(pyqemb, name)),
            lambda r: dict(sections={"model": {"base": "b"}}),
            dict(
                sections=[
                    Named({"model": {"base": "b"}, **more}, pattern)
                    for more, pattern in (
                        ({"x": {}}, "x"),
                        ({"model": 5}, "model"),
                        ({"train": 5}, "train"),
                        ({"train": {"steps": -1}}, "steps"),
                        ({"train": {"stepz": 1}}, "stepz"),
                        ({"save": []}, "save"),
                        ({"loss": {"temperature": math.nan}}, "temper"),
                    )
                ]
            ),
            target=f"training.config.{name}",
        )
    record(
        "training.register_objective",
        training.register_objective,
        lambda r: dict(objective=Own),
        dict(objective=[None, 5, "x", int, Objective, object()]),
    )
    loss_section = training_config.LossSection()
    record(
        "training.Objective",
        Own,
        lambda r: dict(loss=loss_section) | options(r, parameters=LossParameters(loss_section)),
        dict(loss=[None, 5, {}, "x"], parameters=[5, {}, "x"]),
        target="training.objectives.base.Objective",
    )
    model_base = {"base": "b"}
    for kind, base in (
        (training_config.ModelSection, model_base),
        (training_config.DataSet, {"path": "p"}),
        (training_config.LoraSection, {}),
        (training_config.TeacherSection, {"model": "m"}),
        (training_config.GuideSection, {"model": "m"}),
        (training_config.LossSection, {}),
        (training_config.TrainSection, {}),
        (training_config.ParallelSection, {}),
        (training_config.EvalSection, {}),
        (training_config.SaveSection, {}),
        (training_config.LogSection, {}),
        (training_config.EvalDataset, {"path": "p"}),
        (training_config.TrainConfig, {"model": model_base}),
        (InfoNCESection, {}),
        (GroupSection, {}),
        (DistillationSection, {}),
        (EmbeddingSection, {}),
        (Endpoint, {"model": "m"}),
        (CurateConfig, {"input": ["p"], "out": "o", "step": [{"kind": "exact"}]}),
        (SynthesisConfig, {"passages": "p", "out": "o", "endpoint": {"model": "m"}}),
    ):
        in_memory = ["input"] if kind is CurateConfig else []  # rows too; curate checks them
        paths = ["path"] if kind is training_config.DataSet else []
        records[f"settings {kind.__name__}"] = settings_record(kind, base, in_memory, paths)
