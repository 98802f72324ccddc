"""A run is not lost or measured wrongly by what can be known before its first step, nor by what the user's code raises."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

import pyqemb
from pyqemb.cli import main
from pyqemb.data.sealed import seal
from pyqemb.errors import CheckpointError, MachineError
from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import preflight, stage2, state
from pyqemb.training.state import checkpoints, verify

HIGH, LOW = "Find the number", "Find the word"


@pytest.fixture
def place(tmp_path):
    write_tiny_folder(tmp_path / "base")
    for name in ("one", "two"):
        rows = [{"query": f"{name} {i}", "positive": f"{i} {name}"} for i in range(16)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("dev", "dev2"):
        folder = tmp_path / name
        (folder / "qrels").mkdir(parents=True)
        (folder / "queries.jsonl").write_text(
            "\n".join(json.dumps({"_id": f"q{i}", "text": f"one {i}"}) for i in range(6))
        )
        (folder / "corpus.jsonl").write_text(
            "\n".join(json.dumps({"_id": f"d{i}", "text": f"{i} one"}) for i in range(6))
        )
        (folder / "qrels" / "dev.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in range(6)))
    return tmp_path


def config(place, data=("one",), instructions=(None,), **sections):
    entries = [
        {"path": str(place / f"{name}.jsonl"), "instruction": told}
        for name, told in zip(data, instructions, strict=True)
    ]
    train = {"steps": 4, "global_batch_size": 8, "learning_rate": 1e-3, "num_negatives": 0}
    return stage2(
        model={"base": str(place / "base"), **sections.pop("model", {})},
        data=entries,
        train={**train, **sections.pop("train", {})},
        save={"dir": str(place / "run"), "every": 2, **sections.pop("save", {})},
        **sections,
    )


def run_toml(place, text):
    (place / "run.toml").write_text(f"""
[model]
base = "{place / "base"}"
[train]
steps = 4
global_batch_size = 8
num_negatives = 0
[save]
dir = "{place / "run"}"
{text}""")
    return str(place / "run.toml")


TWO = '[[data]]\npath = "{0}/one.jsonl"\ninstruction = "Find the number"\n[[data]]\npath = "{0}/two.jsonl"\ninstruction = "Find the word"\n'


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("section", "code", "message"),
    [
        ('data = "{0}/dev"\nmetric = "ndcg@20"', 2, "eval.metric: 'ndcg@20' is not measured here; expected one of ndcg@10"),
        ('data = "{0}/none"', 3, "none: no such folder"),
        ("every = 2", 2, "eval.every: nothing is evaluated"),
        ('metric = "ndcg@10"', 2, "eval.metric: nothing is evaluated"),
        ('data = "{0}/dev"\npatience = 2', 2, "patience counts evaluations while training: it needs every"),
        ('data = "{0}/dev"\n[[eval.datasets]]\npath = "{0}/dev"', 2, "data and datasets exclude each other"),
        ('[[eval.datasets]]\npath = "{0}/dev"\n[[eval.datasets]]\npath = "{0}/dev"', 2, "two are called 'dev'"),
        ('data = "{0}/dev"\nmode = "best"', 2, "eval.mode"),
    ],
)  # fmt: skip
def test_evaluation_is_checked_before_the_first_step(place, capsys, options, section, code, message):
    path = run_toml(place, f'[[data]]\npath = "{place}/one.jsonl"\n[eval]\n' + section.format(place))
    assert main(["train", path, *options]) == code
    printed = capsys.readouterr()
    assert message in printed.err and "Traceback" not in printed.err and '"learning_rate"' not in printed.out
    assert not (place / "run" / "final").exists()


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_several_instructions_and_none_chosen_are_refused(place, capsys, options):
    path = run_toml(place, TWO.format(place) + f'[eval]\ndata = "{place}/dev"')
    assert main(["train", path, *options]) == 2
    error = capsys.readouterr().err
    assert "eval.instruction" in error and HIGH in error and LOW in error
    assert not (place / "run" / "final").exists()


def test_the_chosen_instruction_is_measured_and_saved(place):
    path = run_toml(place, TWO.format(place) + f'[eval]\ndata = "{place}/dev"\ninstruction = "{LOW}"')
    assert main(["train", path]) == 0
    prompts = json.loads((place / "run" / "final" / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts["query"] == f"Instruct: {LOW}\nQuery:"
    report = pyqemb.evaluate(place / "run" / "final", place / "dev", instruction=LOW, split="dev", bootstrap=0)
    rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").open()]
    assert rows[-1]["eval"]["ndcg@10"] == pytest.approx(report["metrics"]["ndcg@10"]["value"])


def test_queries_with_instructions_of_their_own_need_none(place):
    lines = [json.dumps({"_id": f"q{i}", "text": f"one {i}", "instruction": HIGH}) for i in range(6)]
    (place / "dev" / "queries.jsonl").write_text("\n".join(lines))
    assert main(["train", run_toml(place, TWO.format(place) + f'[eval]\ndata = "{place}/dev"')]) == 0


def test_model_instruction_wins_and_several_without_evaluation_warn(place, caplog):
    chosen = config(place, ("one", "two"), (HIGH, LOW), model={"instruction": "Other"})
    prompts = json.loads((pyqemb.train(chosen).folder / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts["query"] == "Instruct: Other\nQuery:"
    with caplog.at_level(logging.WARNING, "pyqemb"):
        pyqemb.train(config(place, ("one", "two"), (HIGH, None), save={"dir": str(place / "warned")}))
    assert "several instructions" in caplog.text and HIGH in caplog.text


def test_several_datasets_each_with_its_instruction(place, capsys):
    datasets = f"""[eval]
metric = "dev2/recall@10"
[[eval.datasets]]
path = "{place}/dev"
instruction = "{HIGH}"
[[eval.datasets]]
path = "{place}/dev2"
instruction = "{LOW}"
"""
    assert main(["train", run_toml(place, TWO.format(place) + datasets)]) == 0
    rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").open()]
    values = rows[-1]["eval"]
    assert values["ndcg@10"] == pytest.approx((values["dev/ndcg@10"] + values["dev2/ndcg@10"]) / 2)
    for name, told in (("dev", HIGH), ("dev2", LOW)):
        report = pyqemb.evaluate(place / "run" / "final", place / name, instruction=told, split="dev", bootstrap=0)
        assert values[f"{name}/ndcg@10"] == pytest.approx(report["metrics"]["ndcg@10"]["value"])


def test_lower_can_be_better_and_patience_stops(place):
    values = iter([3.0, 1.0, 2.0, 1.5, 0.5])
    chosen = config(place, eval={"every": 1, "mode": "min", "patience": 2}, train={"steps": 9})
    result = pyqemb.train(chosen, evaluate=lambda model: {"loss": next(values)})
    assert result.steps == 4 and result.best is not None
    assert json.loads((result.best / "pyqemb.json").read_text())["provenance"]["step"] == 2
    assert json.loads((result.folder / "pyqemb.json").read_text())["provenance"]["step"] == 4
    again = pyqemb.train(chosen, evaluate=lambda model: {"loss": next(values)}, resume="auto")
    assert again.steps == 4 and next(values) == 0.5


@pytest.mark.parametrize("step", [3, 4])
def test_an_exception_of_the_users_code_costs_no_training(place, capsys, step):
    def fails(row):
        if row["step"] == step:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pyqemb.train(config(place), on_step=fails)
    assert "on_step raised KeyError" in (error := capsys.readouterr().err) and "--resume auto" in error
    assert verify(checkpoints(place / "run" / "checkpoints")[-1]) == step
    resumed = pyqemb.train(config(place), resume="auto")
    straight = pyqemb.train(config(place, save={"dir": str(place / "straight")}))
    a, b = (load_file(result.folder / "model.safetensors") for result in (resumed, straight))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_final_model_is_there_when_the_last_evaluation_fails(place):
    def fails(model):
        raise RuntimeError("no metric today")

    with pytest.raises(RuntimeError, match="no metric today"):
        pyqemb.train(config(place), evaluate=fails)
    final = pyqemb.Embedder.from_pretrained(place / "run" / "final")
    stored = load_file(checkpoints(place / "run" / "checkpoints")[-1] / "model.safetensors")
    assert any(torch.equal(final.model.embed_tokens.weight, weight) for weight in stored.values())


def test_an_unreadable_checkpoint_is_not_a_damaged_one(place, monkeypatch):
    pyqemb.train(config(place))
    before = checkpoints(place / "run" / "checkpoints")
    real = state.sha256

    def eio(path):
        if path.parent == before[-1]:
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(state, "sha256", eio)
    with pytest.raises(MachineError, match=r"cannot be read: Input/output error; nothing was deleted"):
        pyqemb.train(config(place), resume="auto")
    assert checkpoints(place / "run" / "checkpoints") == before


def test_a_run_does_not_start_anew_over_damaged_checkpoints(place):
    pyqemb.train(config(place))
    found = checkpoints(place / "run" / "checkpoints")
    for path in found:
        (path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is sound"):
        pyqemb.train(config(place), resume="auto")
    assert checkpoints(place / "run" / "checkpoints") == found


def test_what_was_not_verified_is_not_deleted(place, caplog, monkeypatch):
    pyqemb.train(config(place))
    first = checkpoints(place / "run" / "checkpoints")[0]
    (first / "state.json").write_text("{}")
    monkeypatch.setattr(state, "_verified", set())
    with caplog.at_level(logging.WARNING, "pyqemb"):
        pyqemb.train(config(place, train={"steps": 8}), resume="auto")
    assert first.is_dir() and "left in place" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {**m, "format": 1}, "is of format 1, this version reads 2"),
        (lambda m: {**m, "step": 3}, "is of step 3, which is not the folder's name"),
        (lambda m: {**m, "extra": 1}, "expected the fields"),
        (lambda m: {k: v for k, v in m.items() if k != "step"}, "expected the fields"),
        (lambda m: {**m, "files": {}}, "expected the fields"),
    ],
)
def test_every_field_of_a_manifest_is_checked(place, change, message):
    pyqemb.train(config(place))
    path = checkpoints(place / "run" / "checkpoints")[-1] / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_bytes(seal(change(manifest)))
    with pytest.raises(CheckpointError, match=message):
        verify(path.parent)


def test_leftovers_of_killed_runs_are_removed(place):
    run = place / "run"
    (run / "checkpoints" / ".77.partial.step_00000002").mkdir(parents=True)
    (run / ".77.partial.final").mkdir()
    (run / ".77.partial.env.json").write_text("{")
    pyqemb.train(config(place))
    assert not list(run.glob(".*.partial.*")) and not list((run / "checkpoints").glob(".*"))


def test_another_number_of_steps_says_what_it_does_to_the_learning_rate(place, caplog):
    pyqemb.train(config(place))
    with caplog.at_level(logging.WARNING, "pyqemb"):
        pyqemb.train(config(place, train={"steps": 6}), resume="auto")
    assert "the run had 4 steps and now has 6: at step 5 the learning rate changes from 0 to" in caplog.text


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("memory", "message"),
    [("10000", "more than the 0.00 GB given"), ("auto", "that are free"), ("none", "that are free")],
)
def test_a_plan_that_exceeds_the_machine_is_refused(place, capsys, monkeypatch, options, memory, message):
    if memory != "10000":
        monkeypatch.setattr(preflight, "free_bytes", lambda device: 1000)
    path = run_toml(place, f'[[data]]\npath = "{place}/one.jsonl"')
    assert main(["train", path, "--set", f"train.memory={memory}", *options]) == 2
    error = capsys.readouterr().err
    assert "train.memory" in error and message in error
    assert not (place / "run" / "checkpoints").exists()


def test_memory_is_planned_unless_it_is_turned_off(place):
    assert config(place).train.memory == "auto" and config(place, train={"memory": "none"}).train.memory is None
    assert "kept" in pyqemb.train(config(place)).metrics[0]


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_disk_without_room_for_two_checkpoints_is_refused(place, capsys, monkeypatch, options):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage)
    assert main(["train", run_toml(place, f'[[data]]\npath = "{place}/one.jsonl"'), *options]) == 74
    assert "do not fit into the 0.00 GB that are free (save.dir)" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_written_is_refused(place, capsys):
    path = run_toml(place, f'[[data]]\npath = "{place}/one.jsonl"')
    assert main(["train", path, "--dry-run", "--set", "save.dir=/proc/run"]) == 74
    assert "/proc" in capsys.readouterr().err
    (place / "file").write_text("")
    assert main(["train", path, "--dry-run", "--set", f"save.dir={place}/file/run"]) == 2
    assert "is a file, expected a folder" in capsys.readouterr().err


def test_python_is_told_that_nothing_evaluates(place, caplog):
    with caplog.at_level(logging.WARNING, "pyqemb"):
        pyqemb.train(config(place, eval={"data": str(place / "dev")}))
    assert "eval.data: nothing is evaluated" in caplog.text and "DevSets" in caplog.text
