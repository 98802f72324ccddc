"""Loggers of `log.to`: the real packages offline; their files are read back."""

import json
import os
import signal
import sqlite3
import struct
import sys
from importlib import import_module

import pytest

import pyqemb
from pyqemb.errors import ConfigError, Interrupted
from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import stage1
from pyqemb.training.callbacks.loggers import LOGGERS
from pyqemb.training.dry_run import plan


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_tiny_folder(tmp_path / "base")
    rows = [{"query": f"q {i}", "positive": f"d {i}"} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(*to, **train):
    return stage1(
        model={"base": "base"}, data=[{"path": "pairs.jsonl"}], train={"steps": 4, "global_batch_size": 8, **train},
        eval={"every": 2}, save={"dir": "run"}, log={"to": to, "project": "mine"},
    )  # fmt: skip


@pytest.fixture
def of_tensorboard():
    pytest.importorskip("tensorboard")

    def read():
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator("run/tensorboard")
        events.Reload()
        return {(name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}

    return read


@pytest.fixture
def of_wandb(place, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")

    def records(path):
        """The payloads of a file of records as LevelDB writes them, all within its first block."""
        content, at = path.read_bytes(), 7
        assert len(content) < 32768
        while at < len(content):
            _, length, _ = struct.unpack_from("<IHB", content, at)
            yield content[at + 7 : at + 7 + length]
            at += 7 + length

    def read():
        wandb.teardown()  # ends the process that writes the files
        found, runs = {}, set()
        for path in place.glob("run/wandb/offline-run-*/*.wandb"):
            for payload in records(path):
                record = wandb.proto.wandb_internal_pb2.Record.FromString(payload)
                values = {(item.key or item.nested_key[0]): item.value_json for item in record.history.item}
                found |= {(name, int(values["_step"])): json.loads(value) for name, value in values.items()}
                if record.run.run_id:
                    runs.add((record.run.run_id, record.run.project, record.run.display_name))
        assert runs == {((place / "run" / "wandb_run_id").read_text().strip(), "mine", "run")}
        return found

    return read


@pytest.fixture
def of_mlflow(place, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")

    def read():
        client = mlflow.MlflowClient()
        (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
        assert run.data.params["model.base"] == "base"
        assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
        return {
            (name.replace("_at_", "@"), metric.step): metric.value
            for name in run.data.metrics
            for metric in client.get_metric_history(run.info.run_id, name)
        }

    return read


@pytest.fixture
def of_trackio(place, monkeypatch):
    trackio = pytest.importorskip("trackio")
    for module in (trackio.utils, import_module("trackio.sqlite_storage")):
        monkeypatch.setattr(module, "TRACKIO_DIR", place / "trackio")

    def read():
        with sqlite3.connect(place / "trackio" / "mine.db") as database:
            rows = list(database.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id"))
        assert len({run_id for run_id, *_ in rows}) == 1
        assert {name for _, name, _, _ in rows} == {"run"}
        return {(name, step): value for *_, step, values in rows for name, value in json.loads(values).items()}

    return read


@pytest.mark.slow
@pytest.mark.parametrize("name", LOGGERS)
def test_steps_and_evaluations_of_a_resumed_run(place, name, request):
    read = request.getfixturevalue(f"of_{name}")

    def stop(row):
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    score = {"ndcg@10": 0.5}
    with pytest.raises(Interrupted):
        pyqemb.train(config(name), evaluate=lambda model: score, on_step=stop)
    pyqemb.train(config(name), evaluate=lambda model: score, resume="auto")
    logged = read()
    rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").open()]
    losses = {("loss", row["step"]): row["loss"] for row in rows if "loss" in row}
    assert len(losses) == 4
    assert {key: logged[key] for key in losses} == pytest.approx(losses)
    assert {key: value for key, value in logged.items() if key[0].startswith("eval/")} == {
        ("eval/ndcg@10", 2): 0.5,
        ("eval/ndcg@10", 4): 0.5,
    }


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_package_is_named_before_the_run(place, name, monkeypatch):
    monkeypatch.setitem(sys.modules, LOGGERS[name].module, None)
    with pytest.raises(ConfigError, match=rf"log\.to: {name} needs the extra {name}: pip install 'pyqemb\[{name}\]'"):
        list(plan(config(name)))
    with pytest.raises(ConfigError, match=rf"needs the extra {name}"):
        pyqemb.train(config(name))
    assert not (place / "run" / "metrics.jsonl").exists()


def test_a_folder_is_no_package(place, monkeypatch):
    """wandb writes its files to a folder `wandb`, which Python would import where the package is missing."""
    (place / "nowhere").mkdir()
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(LOGGERS["wandb"], "module", "nowhere")
    with pytest.raises(ConfigError, match="wandb needs the extra wandb"):
        LOGGERS["wandb"]()


def test_train_tensorboard_means_the_same(place):
    pytest.importorskip("tensorboard")
    pyqemb.train(config(tensorboard=True, steps=1))
    assert any((place / "run" / "tensorboard").iterdir())


def test_an_unknown_logger_is_refused():
    with pytest.raises(ConfigError, match=r"log\.to.*'tensorboard', 'wandb', 'mlflow' or 'trackio'"):
        config("wand")
