"""Callbacks: the order of their calls, what an exception in one costs, and which rank calls them."""

import json
import logging
import os
import signal

import pytest

import pyqemb
from pyqemb.cli import main
from pyqemb.errors import Interrupted
from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import Callback, stage1
from pyqemb.training.callbacks import ProgressDisplay, TrainInfo
from pyqemb.training.parallel.world import World
from pyqemb.training.signals import StopRequest
from pyqemb.training.state import checkpoints, verify
from pyqemb.training.trainer import Run


@pytest.fixture
def place(tmp_path):
    write_tiny_folder(tmp_path / "base")
    rows = [{"query": f"q {i}", "positive": f"d {i}"} for i in range(32)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def config(place, name="run", **sections):
    return stage1(
        model={"base": str(place / "base")}, data=[{"path": str(place / "pairs.jsonl")}],
        train={"steps": 4, "global_batch_size": 8, "learning_rate": 1e-3}, save={"dir": str(place / name), "every": 2},
        **sections,
    )  # fmt: skip


class Recorder(Callback):
    """Notes its calls; raises at one of them."""

    def __init__(self, calls, name="", fail=None):
        self.calls, self.name, self.fail = calls, name, fail

    def note(self, *call):
        self.calls.append((self.name, *call) if self.name else call)
        if call == self.fail:
            raise KeyError("mine")

    def on_train_begin(self, info):
        self.info = info
        self.note("begin", info.step)

    def on_step_end(self, row):
        self.note("step", row["step"])

    def on_evaluate(self, row):
        self.note("evaluate", row["step"], row["eval"]["score"])

    def on_save(self, step, folder):
        assert verify(folder) == step
        self.note("save", step)

    def on_train_end(self, result):
        self.note("end", None if result is None else result.steps)


def test_the_order_of_the_calls(place):
    calls, rows = [], []
    recorder = Recorder(calls)
    settings = config(place, eval={"every": 2})
    pyqemb.train(settings, evaluate=lambda model: {"score": 0.5}, callbacks=[recorder], on_step=rows.append)
    assert calls == [
        ("begin", 0), ("step", 1), ("step", 2), ("evaluate", 2, 0.5), ("save", 2),
        ("step", 3), ("step", 4), ("evaluate", 4, 0.5), ("save", 4), ("end", 4),
    ]  # fmt: skip
    assert recorder.info == TrainInfo(settings, place / "run", steps=4, step=0)
    logged = [json.loads(line) for line in (place / "run" / "metrics.jsonl").open()]
    assert rows == [row for row in logged if "eval" not in row]


def test_several_callbacks_are_called_in_the_order_of_the_list(place):
    calls = []
    pyqemb.train(
        config(place), callbacks=[Recorder(calls, "a"), Recorder(calls, "b")],
        on_step=lambda row: calls.append(("on_step", "step", row["step"])),
    )  # fmt: skip
    names = [name for name, hook, *_ in calls if hook == "step"]
    assert names == ["a", "b", "on_step"] * 4
    assert [name for name, hook, *_ in calls if hook == "end"] == ["a", "b"]


@pytest.mark.parametrize("fail", [("step", 1), ("step", 3), ("evaluate", 3, 0.5), ("save", 2)], ids=str)
def test_an_exception_in_a_callback_saves_a_checkpoint_first(place, caplog, fail):
    calls, settings = [], config(place, eval={"every": 3})
    with pytest.raises(KeyError, match="mine"):
        pyqemb.train(settings, evaluate=lambda model: {"score": 0.5}, callbacks=[Recorder(calls, fail=fail)])
    hook = {"step": "on_step_end", "evaluate": "on_evaluate", "save": "on_save"}[fail[0]]
    assert f"Recorder.{hook} raised KeyError after step {fail[1]} of 4; saved to" in caplog.text
    assert verify(checkpoints(place / "run" / "checkpoints")[-1]) == fail[1]
    assert calls[-1] == ("end", None)
    again = []
    pyqemb.train(settings, evaluate=lambda model: {"score": 0.5}, callbacks=[Recorder(again)], resume="auto")
    assert again[0] == ("begin", fail[1])
    assert again[-1] == ("end", 4)


def test_an_interrupted_run_ends_without_a_result(place):
    calls = []
    with pytest.raises(Interrupted):
        pyqemb.train(
            config(place), callbacks=[Recorder(calls)],
            on_step=lambda row: os.kill(os.getpid(), signal.SIGTERM) if row["step"] == 1 else None,
        )  # fmt: skip
    assert calls == [("begin", 0), ("step", 1), ("save", 1), ("end", None)]


class Second(World):
    """Rank 1 of two whose other rank does the same."""

    def gather_number(self, number):
        return [number] * 2


def test_only_the_first_rank_calls_them(place):
    calls = []
    run = Run(config(place), None, World(), "cpu", StopRequest(), callbacks=[Recorder(calls)])
    run.world = Second(1, 2)
    for hook in ("on_step_end", "on_evaluate", "on_save"):
        run._call(hook, None)
    run.step = run.steps
    run.loop = lambda: None
    assert run.train().steps == 4
    assert not calls


def test_an_exception_before_the_first_step_ends_those_that_began(place):
    calls = []
    first, second, third = Recorder(calls, "a"), Recorder(calls, "b", fail=("begin", 0)), Recorder(calls, "c")
    with pytest.raises(KeyError, match="mine"):
        pyqemb.train(config(place), callbacks=[first, second, third])
    assert calls == [("a", "begin", 0), ("b", "begin", 0), ("a", "end", None)]


class Terminal:
    """A stream that is a terminal."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return True


def test_a_skipped_step_is_shown_on_a_terminal(place):
    """As its row, between the live lines, which need a loss."""
    terminal = Terminal()
    display = ProgressDisplay(terminal)
    display.on_train_begin(TrainInfo(config(place), place, steps=2))
    row = {
        "step": 1,
        "loss": 2.5,
        "positive": 0.5,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "tokens": 9,
        "tokens_per_second": 9,
    }
    display.on_step_end(row)
    assert "step 1/2  loss 2.500  pos 0.50 " in display.line(row)
    assert "masked" not in display.line(row)
    display.on_step_end({"step": 2, "loss": None, "skipped": True, "rows": [3], "tokens": 9})
    display.on_evaluate({"step": 2, "eval": {"score": 0.25}})
    display.on_train_end(None)
    assert '"skipped": true' in terminal.text
    assert '"score": 0.25' in terminal.text


def test_messages_go_to_the_logger(place, caplog, capsys):
    """Python decides where they are shown; the command line shows them on standard error."""
    caplog.set_level(logging.INFO, "pyqemb")
    pyqemb.train(config(place))
    assert any(record.message.startswith("gradient cache: ") for record in caplog.records)
    assert "gradient cache" not in capsys.readouterr().err
    path = place / "run.json"
    path.write_text(config(place, "other").model_dump_json())
    assert main(["train", str(path)]) == 0
    assert "gradient cache: " in capsys.readouterr().err
    assert not logging.getLogger("pyqemb").handlers
