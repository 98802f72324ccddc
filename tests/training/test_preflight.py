"""A run is not lost or measured wrongly by what can be known before its first step, nor by what the user's code
raises.
"""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

import pyqemb
from pyqemb.cli import main
from pyqemb.data.example import Example
from pyqemb.data.sealed import seal
from pyqemb.errors import CheckpointError, ConfigError, MachineError
from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import preflight, stage2, state
from pyqemb.training.config import LossSection
from pyqemb.training.dry_run import plan
from pyqemb.training.objectives import objective_class
from pyqemb.training.rank_plan import Ranks
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


TWO = (
    '[[data]]\npath = "{0}/one.jsonl"\ninstruction = "Find the number"\n'
    '[[data]]\npath = "{0}/two.jsonl"\ninstruction = "Find the word"\n'
)


@pytest.mark.promise("R25", "an evaluation that cannot run")
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("section", "code", "message"),
    [
        ('data = "{0}/dev"\nmetric = "ndcg@20"', 2,
         "eval.metric: 'ndcg@20' is not measured here; expected one of ndcg@10"),
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
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert '"learning_rate"' not in printed.out
    assert not (place / "run" / "final").exists()


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_several_instructions_and_none_chosen_are_refused(place, capsys, options):
    path = run_toml(place, TWO.format(place) + f'[eval]\ndata = "{place}/dev"')
    assert main(["train", path, *options]) == 2
    error = capsys.readouterr().err
    assert "eval.instruction" in error
    assert HIGH in error
    assert LOW in error
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
    assert "several instructions" in caplog.text
    assert HIGH in caplog.text


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
    assert result.steps == 4
    assert result.best is not None
    assert json.loads((result.best / "pyqemb.json").read_text())["provenance"]["step"] == 2
    assert json.loads((result.folder / "pyqemb.json").read_text())["provenance"]["step"] == 4
    again = pyqemb.train(chosen, evaluate=lambda model: {"loss": next(values)}, resume="auto")
    assert again.steps == 4
    assert next(values) == 0.5


@pytest.mark.parametrize("step", [3, pytest.param(4, marks=pytest.mark.deep)])
def test_an_exception_of_the_users_code_costs_no_training(place, caplog, step):
    def fails(row):
        if row["step"] == step:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pyqemb.train(config(place), on_step=fails)
    assert "on_step raised KeyError" in caplog.text
    assert "--resume auto" in caplog.text
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
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is intact"):
        pyqemb.train(config(place), resume="auto")
    assert checkpoints(place / "run" / "checkpoints") == found


def test_what_was_not_verified_is_not_deleted(place, caplog, monkeypatch):
    pyqemb.train(config(place))
    first = checkpoints(place / "run" / "checkpoints")[0]
    (first / "state.json").write_text("{}")
    monkeypatch.setattr(state, "_verified", set())
    with caplog.at_level(logging.WARNING, "pyqemb"):
        pyqemb.train(config(place, train={"steps": 8}), resume="auto")
    assert first.is_dir()
    assert "left in place" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {**m, "format": 1}, "has format 1, this version reads 3"),
        (lambda m: {**m, "step": 3}, "has step 3, which does not match the folder's name"),
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
    assert not list(run.glob(".*.partial.*"))
    assert not list((run / "checkpoints").glob(".*"))


def test_another_number_of_steps_says_what_it_does_to_the_learning_rate(place, caplog):
    pyqemb.train(config(place))
    with caplog.at_level(logging.WARNING, "pyqemb"):
        pyqemb.train(config(place, train={"steps": 6}), resume="auto")
    assert "the run had 4 steps and now has 6: at step 5 the learning rate changes from 0 to" in caplog.text


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("memory", "message"),
    [("10000", "more than the 10.00 kB given"), ("auto", "that are free"), ("none", "that are free")],
)
def test_a_plan_that_exceeds_the_machine_is_refused(place, capsys, monkeypatch, options, memory, message):
    if memory != "10000":
        monkeypatch.setattr(preflight, "free_bytes", lambda device: 1000)
    path = run_toml(place, f'[[data]]\npath = "{place}/one.jsonl"')
    assert main(["train", path, "--set", f"train.memory={memory}", *options]) == 2
    error = capsys.readouterr().err
    assert "train.memory" in error
    assert message in error
    assert not (place / "run" / "checkpoints").exists()


def test_memory_is_planned_unless_it_is_turned_off(place):
    assert config(place).train.memory == "auto"
    assert config(place, train={"memory": "none"}).train.memory is None
    assert "kept" in pyqemb.train(config(place)).metrics[0]


@pytest.mark.promise("R25", "no room for two checkpoints")
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_disk_without_room_for_two_checkpoints_is_refused(place, capsys, monkeypatch, options):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage)
    assert main(["train", run_toml(place, f'[[data]]\npath = "{place}/one.jsonl"'), *options]) == 74
    assert "do not fit into the 1.00 kB that are free (save.dir)" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_written_is_refused(place, capsys):
    path = run_toml(place, f'[[data]]\npath = "{place}/one.jsonl"')
    assert main(["train", path, "--dry-run", "--set", "save.dir=/proc/run"]) == 74
    assert "/proc" in capsys.readouterr().err
    (place / "file").write_text("")
    assert main(["train", path, "--dry-run", "--set", f"save.dir={place}/file/run"]) == 2
    assert "is a file, expected a folder" in capsys.readouterr().err


def plan_and_train(place, capsys, *options):
    """What a dry run and a run print on standard error, after their exit codes."""
    path = str(place / "run.toml")
    found = []
    for more in (["--dry-run"], []):
        code = main(["train", path, *more, *options])
        found.append((code, capsys.readouterr().err))
    return found


@pytest.mark.parametrize(("name", "options"), [("final", []), ("best", []), ("final", ["--resume", "auto"])])
def test_a_finished_run_is_not_written_over(place, capsys, options, name):
    run_toml(place, f'[[data]]\npath = "{place}/one.jsonl"')
    left = place / "run" / name
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("mine")
    for code, error in plan_and_train(place, capsys, *options):
        assert code == 2
        assert f"{left}: an earlier run left its model here" in error
        assert "choose another save.dir, or delete" in error
    assert (left / "model.safetensors").read_text() == "mine"


def test_a_run_killed_between_its_first_evaluation_and_its_first_checkpoint_starts_anew(place, capsys):
    run_toml(place, f'[[data]]\npath = "{place}/one.jsonl"')
    (place / "run" / "best").mkdir(parents=True)
    for code, error in plan_and_train(place, capsys, "--resume", "auto"):
        assert code == 0
        assert "has no checkpoint; it starts from scratch" in error


def test_a_run_is_not_continued_over_another_one(place):
    """Neither its models nor its later checkpoints are replaced by those of the other run."""
    first = pyqemb.train(config(place))
    pyqemb.train(config(place, save={"dir": str(place / "other")}))
    before = checkpoints(place / "other" / "checkpoints")
    start = checkpoints(first.folder.parent / "checkpoints")[0]
    with pytest.raises(ConfigError, match="an earlier run left checkpoints here"):
        pyqemb.train(config(place, save={"dir": str(place / "other")}), resume=start)
    assert checkpoints(place / "other" / "checkpoints") == before
    assert pyqemb.train(config(place, save={"dir": str(place / "new")}), resume=start).steps == 4
    assert pyqemb.train(config(place), resume=start).steps == 4


def test_a_dry_run_finds_what_a_resumed_run_would_refuse(place):
    """The plan of a resumed run raises the error of the run itself, and passes if the run would continue."""
    adapters = {"lora": {"rank": 2}}
    pyqemb.train(config(place, **adapters))
    longer = config(place, train={"steps": 6}, **adapters)
    many = Ranks(2, 2**33)
    for ranks in (None, many):
        assert list(plan(longer, resume="auto", ranks=ranks))

    def refused(chosen, message):
        for run in (lambda: list(plan(chosen, resume="auto")), lambda: pyqemb.train(chosen, resume="auto")):
            with pytest.raises(ConfigError, match=message):
                run()

    refused(config(place, train={"learning_rate": 2e-3}, **adapters), r"train\.learning_rate was 0\.001, now 0\.002")
    refused(config(place, lora={"rank": 3}), r"cannot resume with another configuration: lora\.rank was 2, now 3")
    before = (place / "one.jsonl").read_text()
    (place / "one.jsonl").write_text(before.replace("one 3", "one three"))
    refused(longer, "cannot resume: the training data are not those of the checkpoint")
    (place / "one.jsonl").write_text(before)
    weights = load_file(place / "base" / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, place / "base" / "model.safetensors")
    refused(longer, "cannot resume: the base model .* has changed: model.safetensors was")
    (place / "base" / "model.safetensors").unlink()  # the plan for other ranks needs no weights
    assert list(plan(longer, resume="auto", ranks=many))


def test_an_empty_resume_is_refused(place, capsys):
    run_toml(place, f'[[data]]\npath = "{place}/one.jsonl"')
    for code, error in plan_and_train(place, capsys, "--resume", ""):
        assert code == 2
        assert "resume: expected 'auto' or the path of a checkpoint" in error


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("nowhere", 2, "resume: nowhere: no such folder; expected 'auto', the folder of a run with checkpoints, or"),
        ("run/checkpoints/step_00000002", 2, "resume: run/checkpoints/step_00000002: no such folder; expected 'auto'"),
        ("one.jsonl", 2, "resume: one.jsonl: is a file; expected 'auto', the folder of a run with checkpoints"),
        ("dev", 3, "dev: holds no intact checkpoint; expected 'auto', the folder of a run with checkpoints"),
    ],
)
def test_a_path_without_checkpoints_is_named(place, capsys, monkeypatch, path, code, message):
    monkeypatch.chdir(place)
    run_toml(place, f'[[data]]\npath = "{place}/one.jsonl"')
    for found, error in plan_and_train(place, capsys, "--resume", path):
        assert (found, message in error) == (code, True), error
    assert not (place / "run" / "final").exists()


@pytest.mark.parametrize("options", [[], ["--resume", "auto"]])
@pytest.mark.parametrize("kind", ["a file", "a broken symbolic link"])
@pytest.mark.parametrize("name", ["run/checkpoints", "run/checkpoints/step_00000002", "run/best", "tokens", "run"])
def test_what_is_no_folder_is_found_before_the_first_step(place, capsys, name, kind, options):
    run_toml(place, f'[[data]]\npath = "{place}/one.jsonl"')
    path = place / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine") if kind == "a file" else path.symlink_to(place / "nowhere")
    cache = ["--set", f"train.token_cache={place / 'tokens'}"]
    for code, error in plan_and_train(place, capsys, *options, *cache):
        assert code == 2
        assert f"{path}" in error
        assert f"is {kind}, expected a folder" in error
    assert path.is_symlink() or path.read_text() == "mine"
    assert not (place / "run" / "final").exists()


def test_a_checkpoint_may_be_a_link(place):
    """Its target is written, and a link that is retired is removed and its target left."""
    store = place / "store"
    store.mkdir()
    pyqemb.train(config(place, train={"steps": 4}, save={"keep": 3}))
    for path in checkpoints(place / "run" / "checkpoints"):
        path.rename(store / path.name)
        path.symlink_to(store / path.name)
    folder = place / "run" / "checkpoints"
    pyqemb.train(config(place, train={"steps": 8}, save={"keep": 2}), resume=checkpoints(folder)[-1])
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000006", "step_00000008"]
    assert sorted(path.name for path in store.iterdir()) == ["step_00000002", "step_00000004"]


def test_a_token_cache_that_is_only_read_is_said(place, capsys, caplog, monkeypatch):
    (place / "tokens").mkdir()
    path = run_toml(place, f'[[data]]\npath = "{place}/one.jsonl"')

    def refuse(path, folder):
        if "tokens" in str(path):
            raise MachineError(f"{path}: cannot be written: Read-only file system")

    monkeypatch.setattr(preflight, "check_writable", refuse)
    assert main(["train", path, "--dry-run", "--set", f"train.token_cache={place}/tokens"]) == 0
    assert "train.token_cache: " in caplog.text
    assert "Read-only file system" in caplog.text
    assert main(["train", path, "--dry-run", "--set", f"train.token_cache={place}/new/tokens"]) == 74


def test_an_objective_of_a_task_that_no_row_has_is_refused(place, capsys):
    rows = [{"query": str(i), "positive": "p", "score": 0.5, "task": "pairs"} for i in range(8)]
    (place / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = '[[data]]\npath = "{}/{}.jsonl"\n[loss.tasks]\n'
    run_toml(place, data.format(place, "tasks") + 'pairs = "cosent"\npiars = "cosent"')
    for code, error in plan_and_train(place, capsys):
        assert code == 2
        assert "loss.tasks.piars: no row has this task; the data have the tasks pairs" in error
    run_toml(place, data.format(place, "one") + 'sts = "cosent"')
    assert all("the data have no task" in error for _, error in plan_and_train(place, capsys))
    with pytest.raises(ConfigError, match=r"task 'rerank' has no loss\.tasks"):
        config(place, task="rerank", loss={"tasks": {"a": "cosent"}})


@pytest.mark.parametrize(
    ("sections", "warning"),
    [
        ({"train": {"global_batch_size": 1}}, "set 'one': info_nce has nothing to compare a positive with"),
        ({"loss": {"groups": {"batch_positive": False}, "preset": "mnrl"}}, "info_nce has nothing to compare"),
        ({"train": {"warmup": 4}}, "train.warmup is 4 steps of a run of 4: the learning rate only rises"),
        ({"model": {"max_length": 5000}}, "model.max_length is 5000, but the base model has 512 positions"),
        ({"train": {"warmup": 3}, "model": {"max_length": 512}, "loss": {"preset": "mnrl"}}, ""),
        ({"train": {"global_batch_size": 2}}, ""),
    ],
)
def test_settings_that_do_less_than_they_say_are_warned_of(place, caplog, sections, warning):
    for run in (lambda: list(plan(config(place, **sections))), lambda: pyqemb.train(config(place, **sections))):
        caplog.clear()
        run()
        assert warning in caplog.text
        assert warning or not caplog.records


@pytest.mark.parametrize(
    ("objective", "loss", "learns"),  # with (batch size, negatives) of (1, 0), (1, 1), (2, 0)
    [
        ("info_nce", {}, [False, True, True]),
        ("info_nce", {"preset": "mnrl", "groups": {"batch_positive": False}}, [False, True, False]),
        ("info_nce", {"preset": "mnrl", "groups": {"own_hard": False}}, [False, False, True]),
        ("info_nce", {"groups": {"own_hard": False, "doc_own": {"mask": "own"}}}, [False, True, True]),
        ("classification", {}, [False, True, False]),
        ("cosent", {}, [False, False, True]),
        ("distillation", {}, [False, True, False]),
        ("rerank", {}, [False, True, False]),
    ],
)
def test_which_batches_can_be_learned_from(objective, loss, learns):
    section = LossSection(**loss)
    found = [
        objective_class(objective)(section).can_learn(*each, Example("q", "p", scores=(1.0,)))
        for each in ((1, 0), (1, 1), (2, 0))
    ]
    assert found == learns
    assert objective_class("distillation")(section).can_learn(1, 0, Example("q", "p", query_embedding=(1.0,)))


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (2.5e6, "2.50 MB"), (123e9, "123.00 GB")]
)
def test_sizes_have_units_that_show_them(count, text):
    assert preflight.in_units(count) == text


def test_python_is_told_that_nothing_evaluates(place, caplog):
    with caplog.at_level(logging.WARNING, "pyqemb"):
        pyqemb.training.train(config(place, eval={"data": str(place / "dev")}))
    assert "eval.data: nothing is evaluated" in caplog.text
    assert "DevSets" in caplog.text


def test_the_eval_section_is_measured(place):
    result = pyqemb.train(config(place, eval={"data": str(place / "dev")}))
    assert result.best is not None


def test_columns_of_an_evaluation_dataset(place):
    rows = [{"question": f"query {i}", "answer": f"positive {i}", "id": i} for i in range(8)]
    (place / "faq.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"query": "question", "positive": "answer", "ignore": "id"}
    dataset = {"path": str(place / "faq.jsonl"), "columns": columns}
    result = pyqemb.train(config(place, eval={"datasets": [dataset]}))
    assert 0 < [row["eval"] for row in result.metrics if "eval" in row][-1]["faq/ndcg@10"] <= 1
    with pytest.raises(ConfigError, match=r"eval\.datasets\.0\.columns: 'query_text' is not a column"):
        config(place, eval={"datasets": [dataset | {"columns": {"query_text": "question"}}]})


def test_a_run_of_few_steps_is_said(place, caplog):
    with caplog.at_level(logging.WARNING, "pyqemb"):
        pyqemb.train(config(place, train={"steps": None, "epochs": 1.0, "global_batch_size": 512}))
    assert "the run has only 1 step: train.global_batch_size is 512" in caplog.text
