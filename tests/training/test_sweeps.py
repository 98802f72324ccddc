"""Sweeps: every combination in its folder, once; interrupted and failed runs; tasks; the table and the best."""

import json
import logging
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

import pyqemb
from pyqemb.cli import main
from pyqemb.errors import ConfigError, Interrupted
from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import load_config, trainer
from pyqemb.training.sweeps import SweepReport, SweepRun, split_values, task_of, trials

RUN = """
[model]
base = "base"
[[data]]
path = "pairs.jsonl"
[train]
steps = 2
global_batch_size = 8
num_negatives = 0
device = "cpu"
memory = "none"
[eval]
data = "dev.jsonl"
[save]
dir = "runs"
"""
RATES = "train.learning_rate=1e-5,1e-3"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN"):
        monkeypatch.delenv(name, raising=False)
    write_tiny_folder("base")
    for name, first in (("pairs", 0), ("dev", 50)):
        rows = [{"query": f"{n} {n + 1}", "positive": f"{n + 1} {n}"} for n in range(first, first + 24)]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("run.toml").write_text(RUN)
    return tmp_path


@pytest.fixture
def trained(monkeypatch):
    """The names of the runs in which a step was done, in order."""
    steps, real = [], trainer.Run.train_step

    def train_step(self):
        if not steps or steps[-1] != self.folder.name:
            steps.append(self.folder.name)
        return real(self)

    monkeypatch.setattr(trainer.Run, "train_step", train_step)
    return steps


def names(report):
    return [run.name for run in report.runs]


def test_values_are_split_at_commas_outside_of_brackets_and_quotes():
    assert split_values("1e-5, 2e-5") == ["1e-5", "2e-5"]
    assert split_values("[64,32],[128]") == ["[64,32]", "[128]"]
    assert split_values("'a,b',{c: 1, d: 2},null") == ["'a,b'", "{c: 1, d: 2}", "null"]


def test_every_combination_has_a_folder_and_a_configuration(workplace):
    over = {"train.learning_rate": ["1e-5", 2e-5], "loss.matryoshka": ["[16,8]", "null"], "data.0.path": ["a/b.jsonl"]}
    found = trials("run.toml", over, "out", ["train.seed=3"])
    assert [trial.name for trial in found] == [
        "learning_rate=1e-5,matryoshka=16-8,path=a-b.jsonl", "learning_rate=1e-5,matryoshka=null,path=a-b.jsonl",
        "learning_rate=2e-05,matryoshka=16-8,path=a-b.jsonl", "learning_rate=2e-05,matryoshka=null,path=a-b.jsonl",
    ]  # fmt: skip
    first, last = found[0].config, found[-1].config
    assert (first.train.learning_rate, first.loss.matryoshka, first.data[0].path) == (1e-5, (16, 8), "a/b.jsonl")
    assert (last.train.learning_rate, last.loss.matryoshka) == (2e-5, None)
    assert {trial.config.train.seed for trial in found} == {3}
    assert [trial.config.save.dir for trial in found] == [f"out/{trial.name}" for trial in found]
    assert trials("run.toml", {"train.seed": [0]})[0].config.save.dir == "runs/seed=0"
    assert trials("run.toml", {"train.weight_decay": [0], "model.base": ["b"]})[0].name == "weight_decay=0,base=b"
    named = trials(load_config("run.toml"), {"train.lr": [1e-4]})
    assert named[0].config.train.learning_rate == 1e-4
    assert named[0].config.train.steps == 2


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (["train.learning_rat=1e-5"], r"train\.learning_rat: unknown key; did you mean 'learning_rate'"),
        (["trian.learning_rate=1e-5,1e-4"], r"trian: unknown key; did you mean 'train'"),
        (["train.learning_rate=1e-5,-1"], r"train\.learning_rate: .* got -1"),
        (["train.learning_rate=1e-5,1e-5"], r"--over: two runs would be called learning_rate=1e-5"),
        ([RATES, RATES], r"--over train\.learning_rate: is given twice"),
        (["train.learning_rate"], r"--over: expected KEY=VALUE,VALUE, got 'train\.learning_rate'"),
        (
            ["train.learning_rate=1e-3,0.001"],
            r"learning_rate=1e-3 and learning_rate=0\.001 are the same run; give each",
        ),
        (["save.dir=a,b"], r"--over save\.dir: is the same for all runs"),
        (["eval.metric=a,b"], r"--over eval\.metric: is the same for all runs"),
        ([RATES, "--metric=ndcg@11"], r"eval\.metric: 'ndcg@11' is not measured here"),
        ([RATES, "--set=eval.data=null"], r"eval\.data: missing; the runs of a sweep are compared"),
        ([RATES, "--tasks=2"], r"--tasks and --task belong together"),
        ([RATES, "--tasks=2", "--task=2"], r"--task: expected 0 to 1 with --tasks 2, got 2"),
    ],
)
def test_mistakes_are_named_before_anything_runs(workplace, trained, capsys, over, message):
    options = [option if option.startswith("--") else f"--over={option}" for option in over]
    assert main(["sweep", "run.toml", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pyqemb sweep: ")
    assert re.search(message, error), error
    assert not trained
    assert not Path("runs").exists()


def test_a_sweep_runs_once_and_its_runs_are_those_of_train(workplace, trained, capsys):
    assert main(["sweep", "run.toml", "--over", RATES, "--over", "train.seed=0,1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    wanted = [f"learning_rate={rate},seed={seed}" for rate in ("1e-5", "1e-3") for seed in (0, 1)]
    assert trained == wanted
    assert report["metric"] == "ndcg@10"
    values = {run["name"]: run["value"] for run in report["runs"]}
    assert [run["name"] for run in report["runs"]] == sorted(wanted, key=lambda name: -values[name])
    assert report["best"] == max(values, key=values.get)
    assert values[wanted[0]] != values[wanted[2]]
    for run in report["runs"]:
        contract = json.loads((Path(run["folder"]) / "best" / "pyqemb.json").read_text())["provenance"]
        assert (run["value"], run["step"]) == (contract["results"]["ndcg@10"], contract["step"])
        assert run["status"] == "done"

    rate, seed = 1e-3, 1
    alone = load_config("run.toml", [f"train.learning_rate={rate}", f"train.seed={seed}", "save.dir=alone"])
    one = load_file(pyqemb.train(alone).folder / "model.safetensors")
    other = load_file(Path("runs") / wanted[3] / "final" / "model.safetensors")
    assert all((one[name] == other[name]).all() for name in one)

    del trained[:]
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    assert main(["sweep", "run.toml", "--over", RATES, "--over", "train.seed=0,1"]) == 0
    assert trained == []
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == before  # not evaluated again either
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["learning_rate", "seed", "ndcg@10", "step", "last"]
    assert len(lines) == 6
    assert lines[-1] == f"the best is {report['best']}; its model is in runs/{report['best']}/best"
    assert lines[1].split()[2] == f"{values[report['best']]:.4f}"

    assert main(["sweep", "run.toml", "--over", RATES, "--over", "train.seed=0,1", "--set", "train.steps=3"]) == 2
    assert "seed=0: was run with other settings: train.steps was 2, now 3; choose another" in capsys.readouterr().err


def test_an_interrupted_run_continues(workplace, trained, monkeypatch):
    real = trainer.Run.train_step

    def interrupted(self):
        if self.folder.name == "learning_rate=1e-3" and self.step == 1:
            raise Interrupted("stopped by SIGTERM")
        return real(self)

    def run(out):
        over = {"train.learning_rate": ["1e-5", "1e-3"]}
        return pyqemb.sweep("run.toml", over, out=out, overrides=["save.every=1"], progress="off")

    straight = run("straight")
    del trained[:]
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Run, "train_step", interrupted)
        with pytest.raises(Interrupted, match="learning_rate=1e-3: stopped; the same command continues the sweep"):
            run("stopped")
    assert trained == ["learning_rate=1e-5", "learning_rate=1e-3"]
    assert not Path("stopped/learning_rate=1e-3/final").exists()
    del trained[:]
    again = run("stopped")
    assert trained == ["learning_rate=1e-3"]
    assert [(run.name, run.value) for run in again.runs] == [(run.name, run.value) for run in straight.runs]


def test_a_failed_run_is_reported_and_tried_again(workplace, trained, capsys):
    """A rate with which no step is finite."""
    options = ["sweep", "run.toml", "--over", "train.learning_rate=1e-3,1e30", "--set", "train.steps=4",
               "--set", "train.max_bad_steps=1"]  # fmt: skip
    assert main(options) == 1
    out = capsys.readouterr().out.splitlines()
    assert "failed: stopped after 1 steps in a row that were not finite" in out[2]
    assert out[3].startswith("the best is learning_rate=1e-3;")
    assert trained == ["learning_rate=1e-3", "learning_rate=1e30"]
    del trained[:]
    main(options)
    assert trained == ["learning_rate=1e30"]


def test_tasks_share_the_runs(workplace, trained, capsys, monkeypatch):
    options = ["sweep", "run.toml", "--over", "train.seed=0,1,2"]
    assert main([*options, "--tasks", "2", "--task", "1"]) == 0
    assert trained == ["seed=1"]
    assert "2 of 3 runs are not finished; the same command continues them" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert task_of(None, None) == (2, 0)
    assert task_of(3, 2) == (3, 2)
    assert main(options) == 0
    assert trained == ["seed=1", "seed=0", "seed=2"]
    assert "not finished" not in capsys.readouterr().out
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "x")
    with pytest.raises(ConfigError, match="SLURM_ARRAY_TASK_ID: expected the numbers of a Slurm array"):
        task_of(None, None)


def test_a_value_that_no_file_can_hold_is_refused(workplace, trained):
    with pytest.raises(ConfigError, match=r"^--over train\.seed: expected values as in a configuration file"):
        pyqemb.sweep("run.toml", {"train.seed": [object()]}, progress="off")


def test_the_best_is_the_lowest_with_mode_min():
    runs = [SweepRun(name, name, {"a.b": name}, "done", value, 1, value) for name, value in (("x", 0.1), ("y", 0.2))]
    assert SweepReport("s", "loss", "min", runs).best.name == "x"
    assert SweepReport("s", "loss", "min", [SweepRun("x", "x", {"a.b": "x"})]).best is None
    assert SweepReport("s", "loss", "min", [SweepRun("x", "x", {"a.b": "1", "c.b": "2"})]).table().splitlines() == [
        "a.b  c.b  loss  step  last",
        "1    2    -     -     -     pending",
    ]


def test_ranks_of_torchrun_are_refused(workplace, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["sweep", "run.toml", "--over", RATES]) == 2
    assert "a sweep runs in one process; start tasks with --tasks and --task" in capsys.readouterr().err


def test_a_cache_of_vectors_may_move_and_changed_data_are_noticed(workplace, trained, caplog):
    write_tiny_folder("teacher", seed=3)
    overrides = ["teacher.model=teacher", "train.steps=1"]

    def run(seeds, *more):
        with caplog.at_level(logging.WARNING, "pyqemb"):
            caplog.clear()
            report = pyqemb.sweep("run.toml", {"train.seed": seeds}, overrides=[*overrides, *more], progress="off")
        return report, [record.message for record in caplog.records if record.message.startswith("sweep: ")]

    run(["0"])
    report, messages = run(["0", "1"], "teacher.cache=vectors")
    assert trained == ["seed=0", "seed=1"]
    assert (len(report.runs), report.num_pending, messages) == (2, 0, [])
    rows = Path("pairs.jsonl").read_text().splitlines()
    Path("pairs.jsonl").write_text("\n".join(rows[:-1]))
    report, messages = run(["0", "1", "2"])
    assert trained == ["seed=0", "seed=1", "seed=2"]
    assert len(messages) == 1
    assert messages[0].startswith("sweep: the training data changed between the finished runs")
