"""A teacher: its vectors, its loss, and runs with one."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

import pyqemb
from pyqemb.cli import main
from pyqemb.data.example import Example
from pyqemb.data.loader import build_batch
from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.model.embedder import Embedder
from pyqemb.testing.tiny import tiny_embedder, write_tiny_folder
from pyqemb.training import stage1, stage2
from pyqemb.training.config import TeacherSection
from pyqemb.training.resume import _with_new_keys
from pyqemb.training.steps import StepLoader
from pyqemb.training.teacher import Teacher, first_projection, teacher_loss

ROWS = [
    {"query": f"how do I {verb}?", "positive": f"choose {verb} in the menu", "negatives": [f"do not {verb}"]}
    for verb in ("print", "save", "undo", "cut", "copy", "paste")
]


@pytest.fixture
def folders(tmp_path):
    """A model of 32 features, and a teacher of 48."""
    write_tiny_folder(tmp_path / "base")
    teacher = write_tiny_folder(tmp_path / "plain-teacher", seed=7, hidden_size=48)
    model = Embedder.from_pretrained(teacher)
    model.default_instruction = "the teacher's own"
    model.save_pretrained(tmp_path / "teacher")
    return tmp_path


def config(folders, run, teacher=None, data=None, **train):
    defaults = {"steps": 4, "global_batch_size": 6, "num_negatives": 1, "learning_rate": 1e-3, "device": "cpu"}
    data = data or {"rows": ROWS}
    section = {"model": str(folders / "teacher"), **(teacher or {})}
    return stage2(
        model={"base": str(folders / "base")}, teacher=section, train={**defaults, **train}, data=[data],
        save={"dir": str(folders / run), "every": 2},
    )  # fmt: skip


def unit(*shape, seed=0):
    return normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("projected", [True, False])
def test_the_loss_is_that_of_the_definition(projected):
    student, teacher = unit(5, 6).requires_grad_(), unit(5, 9, seed=1)
    projection = torch.randn(9, 6, dtype=torch.float64).requires_grad_() if projected else None
    expected = 0.0
    for x, t in zip(student.detach().numpy(), teacher.numpy(), strict=True):
        if projected:
            x = projection.detach().numpy() @ x
        else:
            t = t[:6] / np.linalg.norm(t[:6])
        expected += 2 * (1 - x @ t / np.linalg.norm(x) / np.linalg.norm(t)) + 3 * np.mean((x - t) ** 2)
    assert teacher_loss(student, teacher, projection, 2.0, 3.0).item() == pytest.approx(expected, rel=1e-13)
    inputs = (student, projection) if projected else (student,)
    assert torch.autograd.gradcheck(lambda x, p=None: teacher_loss(x, teacher, p, 2.0, 3.0), inputs)


def test_queries_have_the_instruction_of_their_row_and_texts_are_encoded_once(folders, monkeypatch):
    rows = [Example("a query", "a document", ("no",), instruction="find"), Example("other", "a document")]
    batch = build_batch(rows, tiny_embedder().tokenizer)
    teacher = Teacher(TeacherSection(model=str(folders / "teacher")), folders / "cache", torch.device("cpu"))
    model = Embedder.from_pretrained(folders / "teacher")
    expected = {
        int(batch.query_text[0]): model.encode_query(["a query"], instruction="find")[0],
        int(batch.query_text[1]): model.encode_query(["other"], instruction="the teacher's own")[0],
        batch.texts.index("a document"): model.encode_document(["a document"])[0],
        batch.texts.index("no"): model.encode_document(["no"])[0],
    }
    texts = list(expected)[::-1]
    for _ in range(2):
        found = teacher.vectors(batch, texts)
        assert found.shape == (4, 48)
        assert np.allclose(found, [expected[text] for text in texts], atol=1e-6)
        monkeypatch.setattr(Embedder, "encode", None)  # the second time from the cache


def test_the_losses_are_added(folders):
    """Of the first step: the objective alone, and with a teacher of weight 2 and an objective of weight 0.5."""
    plain = config(folders, "plain", learning_rate=1e-12).model_copy(update={"teacher": None})
    alone = pyqemb.train(plain, data=None).metrics[0]
    weighted = config(
        folders, "both", {"mse": 1.0, "weight": 2.0}, {"rows": ROWS, "objective_weight": 0.5}, learning_rate=1e-12
    )
    both = pyqemb.train(weighted).metrics[0]
    student, teacher = (Embedder.from_pretrained(folders / name) for name in ("both/final", "teacher"))
    queries = [row["query"] for row in ROWS]
    documents = [text for row in ROWS for text in (row["positive"], *row["negatives"])]
    vectors = [
        torch.from_numpy(np.concatenate([m.encode_query(queries), m.encode_document(documents)]))
        for m in (student, teacher)
    ]
    expected = teacher_loss(*vectors, first_projection(48, 32, seed=0), 1.0, 1.0) / 18
    assert both["teacher"] == pytest.approx(float(expected), rel=1e-3)
    assert both["loss"] == pytest.approx(0.5 * alone["loss"] + 2 * both["teacher"], rel=1e-5)
    assert "teacher" not in alone


def test_the_projection_is_written_apart_and_resumes_bit_for_bit(folders):
    pyqemb.train(config(folders, "whole"))
    whole = load_file(folders / "whole" / "teacher" / "projection.safetensors")
    assert list(whole) == ["projection.weight"]
    assert whole["projection.weight"].shape == (48, 32)
    assert not torch.equal(whole["projection.weight"], first_projection(48, 32, seed=0))
    assert not (folders / "whole" / "final" / "projection.safetensors").exists()

    def stop(row):
        if row["step"] == 3:
            raise KeyError("stopped")

    with pytest.raises(KeyError):
        pyqemb.train(config(folders, "parts"), on_step=stop)
    pyqemb.train(config(folders, "parts", {"cache": str(folders / "elsewhere")}), resume="auto")
    for name in ("teacher/projection.safetensors", "final/model.safetensors"):
        assert (folders / "whole" / name).read_bytes() == (folders / "parts" / name).read_bytes()


def test_the_teacher_is_approached(folders):
    """Alone, the teacher's loss falls."""
    data = {"rows": ROWS, "objective_weight": 0.0}
    rows = pyqemb.train(config(folders, "alone", data=data, steps=40, learning_rate=5e-3)).metrics
    losses = [row["teacher"] for row in rows if "teacher" in row]
    assert losses[-1] < 0.5 * losses[0]
    assert rows[0]["loss"] == pytest.approx(losses[0], rel=1e-6)


def test_texts_without_weight_are_not_encoded_and_nothing_else_changes(folders, monkeypatch):
    def train(run):
        whole = config(folders, run, steps=6, global_batch_size=3).model_dump(exclude_unset=True)
        data = [{"rows": ROWS[:3], "name": "with"}, {"rows": ROWS[3:], "name": "without", "teacher_weight": 0.0}]
        metrics = pyqemb.train(stage2(**{**whole, "data": data})).metrics
        states = [load_file(folders / run / "checkpoints" / "step_00000006" / f"{name}.safetensors")
                  for name in ("model", "optimizer")]  # fmt: skip
        return [row for row in metrics if "loss" in row], states

    encoded, vectors, load = set(), Teacher.vectors, StepLoader.load

    def recorded(self, batch, texts):
        encoded.update(batch.texts[text] for text in texts)
        return vectors(self, batch, texts)

    def with_teacher(self, step):
        return replace(load(self, step), teacher=self._teacher)

    monkeypatch.setattr(Teacher, "vectors", recorded)
    rows, states = train("spared")
    assert {row["dataset"]: "teacher" in row for row in rows} == {"with": True, "without": False}
    assert {verb for verb in ("print", "cut") if any(verb in text for text in encoded)} == {"print"}
    monkeypatch.setattr(StepLoader, "load", with_teacher)
    all_rows, all_states = train("all")
    assert any("cut" in text for text in encoded)
    assert [(row["loss"], row["grad_norm"]) for row in rows] == [(row["loss"], row["grad_norm"]) for row in all_rows]
    for state, expected in zip(states, all_states, strict=True):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)


def test_a_truncated_teacher_has_no_parameters(folders):
    result = pyqemb.train(config(folders, "truncated", {"projection": False}))
    assert result.steps == 4
    assert not (folders / "truncated" / "teacher" / "projection.safetensors").exists()


def test_what_is_refused(folders):
    write_tiny_folder(folders / "small", seed=3, hidden_size=16)
    with pytest.raises(ConfigError, match=r"the teacher's vectors have 16 features, the model's 32"):
        pyqemb.train(config(folders, "x", {"model": str(folders / "small"), "projection": False}))
    with pytest.raises(ConfigError, match=r"^teacher\.mse: cosine and mse are both 0; .* got 0\.0$"):
        config(folders, "x", {"cosine": 0.0})
    sections = {"model": {"base": "x"}, "data": [{"path": "x", "teacher_weight": 1.0}]}
    with pytest.raises(ConfigError, match=r"data\.0\.teacher_weight: is set, but there is no \[teacher\], got 1\.0$"):
        stage2(**sections)
    with pytest.raises(ConfigError, match=r"^task 'rerank' has no teacher$"):
        stage2(task="rerank", model={"base": "x"}, data=[{"path": "x"}], teacher={"model": "x"})
    with pytest.raises(ConfigError, match=r"^data\.0\.objective_weight: there is no \[teacher\], so .* nothing"):
        stage2(model={"base": "x"}, data=[{"path": "x", "objective_weight": 0}])
    weightless = {"path": "y", "objective_weight": 0, "teacher_weight": 0}
    with pytest.raises(ConfigError, match=r"^data\.1\.objective_weight: the weight of the teacher's loss is 0 too"):
        stage2(model={"base": "x"}, data=[{"path": "x"}, weightless], teacher={"model": "x"})
    with pytest.raises(ConfigError, match=r"^data\.0\.objective_weight"):
        stage2(model={"base": "x"}, data=[{"path": "x", "objective_weight": 0}], teacher={"model": "x", "weight": 0})
    stage2(model={"base": "x"}, data=[{"path": "x", "objective_weight": 0}], loss={"spread_out": 1.0})
    with pytest.raises(ConfigError, match=r"^teacher\.cache: "):
        stage2(model={"base": "x"}, data=[{"path": "x"}], teacher={"model": "x", "cache": ""})
    assert not (folders / "x" / "final").exists()


@pytest.mark.parametrize("section", ["teacher", "guide"])
def test_a_wrong_folder_is_named_with_its_setting(folders, capsys, section):
    (folders / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {
        "model": {"base": str(folders / "base")}, "data": [{"path": str(folders / "pairs.jsonl")}],
        "train": {"steps": 1, "device": "cpu"}, "save": {"dir": str(folders / "x")},
    }  # fmt: skip

    def message(**values):
        (folders / "run.json").write_text(json.dumps({**settings, section: {"model": "x", **values}}))
        found = []
        for options in ([], ["--dry-run"]):
            code = main(["train", str(folders / "run.json"), *options])
            found.append((code, capsys.readouterr().err.splitlines()[-1].removeprefix("pyqemb train: ")))
        assert found[0] == found[1]  # the dry run finds it too
        return found[0]

    teacher, file = str(folders / "teacher"), str(folders / "pairs.jsonl")
    assert message(model=str(folders / "none")) == (3, f"{section}.model: {folders / 'none'}: no such model folder")
    assert message(model=teacher, cache=file) == (2, f"{section}.cache: {file} is a file, expected a folder")
    code, text = message(model=teacher, cache=f"{file}/vectors")
    assert code == 74
    assert text.startswith(f"{section}.cache: {file}/vectors")
    assert not (folders / "x" / "final").exists()


@pytest.mark.parametrize("section", ["teacher", "guide"])
def test_a_model_whose_vectors_are_zero_is_refused(folders, section):
    """Neither a loss nor a mask can be computed from a vector without a direction."""
    weights = load_file(folders / "teacher" / "model.safetensors")
    save_file({**weights, "norm.weight": 0 * weights["norm.weight"]}, folders / "teacher" / "model.safetensors")
    (folders / "teacher" / "pyqemb.json").unlink()  # the digest of the weights
    with pytest.raises(CheckpointError, match=rf"^{section}\.model: .*teacher gives a zero vector for '"):
        pyqemb.train(stage2(
            model={"base": str(folders / "base")}, data=[{"rows": ROWS}], save={"dir": str(folders / "x")},
            train={"steps": 1, "device": "cpu"}, **{section: {"model": str(folders / "teacher")}},
        ))  # fmt: skip


@pytest.mark.parametrize("section", ["teacher", "guide"])
def test_a_run_is_not_resumed_with_another_model(folders, section):
    other = write_tiny_folder(folders / "other", seed=9, hidden_size=48)
    settings = {
        "model": {"base": str(folders / "base")}, "data": [{"rows": ROWS}],
        section: {"model": str(folders / "plain-teacher")}, "save": {"dir": str(folders / "x"), "every": 1},
    }  # fmt: skip
    pyqemb.train(stage2(**settings, train={"steps": 1, "device": "cpu"}))
    longer = stage2(**settings, train={"steps": 2, "device": "cpu"})
    (folders / "plain-teacher" / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(
        ConfigError, match=rf"cannot resume: {section}\.model .*plain-teacher has changed: model.safete"
    ):
        pyqemb.train(longer, resume="auto")
    write_tiny_folder(folders / "plain-teacher", seed=7, hidden_size=48)
    assert pyqemb.train(longer, resume="auto").steps == 2


def test_data_given_to_train_are_checked_with_the_whole_configuration(folders):
    sections = {"model": {"base": str(folders / "base")}, "save": {"dir": str(folders / "x")}}
    teacher = {"model": str(folders / "teacher")}
    entry = {"rows": ROWS, "teacher_weight": 0.5}
    settings = {"steps": 1, "device": "cpu"}
    pyqemb.train(stage2(**sections, teacher=teacher, train=settings), data=[entry])
    with pytest.raises(ConfigError, match=r"data\.0\.teacher_weight: is set, but there is no \[teacher\]"):
        pyqemb.train(stage2(**sections, train=settings), data=[entry])
    ring = stage1(**sections, train={**settings, "documents": "ring"})
    with pytest.raises(ConfigError, match=r"^train\.documents: a ring takes one positive a query"):
        pyqemb.train(ring, data=[{"rows": ROWS, "group_positives": True}])


def test_a_dry_run_names_the_teacher(folders, capsys):
    config_file = folders / "run.json"
    config_file.write_text(json.dumps({
        "model": {"base": str(folders / "base")}, "data": [{"path": str(folders / "pairs.jsonl")}],
        "teacher": {"model": str(folders / "teacher")}, "save": {"dir": str(folders / "dry")},
    }))  # fmt: skip
    (folders / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert main(["train", str(config_file), "--dry-run"]) == 0
    assert f"teacher    {folders / 'teacher'}, weight 1" in capsys.readouterr().out
    assert main(["train", str(config_file), "--dry-run", "--set", "teacher.model=nowhere/at/all"]) in (2, 3)


def test_a_checkpoint_without_the_new_keys_has_their_defaults(folders):
    dumped = config(folders, "x").model_dump(mode="json")
    older = json.loads(json.dumps(dumped))
    for section, key in (("loss", "precisions"), ("loss", "spread_out"), ("loss", "tau_plus")):
        del older[section][key]
    for key in ("objective_weight", "teacher_weight", "group_positives"):
        del older["data"][0][key]
    del older["guide"]
    assert _with_new_keys(older) == dumped
