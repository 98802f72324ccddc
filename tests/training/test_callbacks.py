"""Callbacks: the order of their calls, what an exception in one costs, and which rank calls them."""

import fcntl
import io
import json
import logging
import os
import re
import signal
import struct
import termios

import pytest

import pyqemb
from pyqemb.cli import main
from pyqemb.errors import ConfigError, Interrupted
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


ROW = {
    "step": 1, "loss": 12.5, "positive": 0.5, "negative": 0.25, "masked": 0.01, "grad_norm": 1.0, "learning_rate": 1e-3,
    "tokens": 9, "tokens_per_second": 123456,
}  # fmt: skip


def show_a_run(place, stream):
    display = ProgressDisplay(stream)
    display.on_train_begin(TrainInfo(config(place, eval={"every": 2}), place, steps=20_000))
    display.on_step_end(ROW)
    display.on_step_end({"step": 2, "loss": None, "skipped": True, "rows": [3], "tokens": 9})
    display.on_evaluate({"step": 2, "eval": {"ndcg@10": 0.250000001, "de/recall@100": 0.5}})
    display.on_step_end(ROW | {"step": 3})
    display.on_evaluate({"step": 3, "eval": {"ndcg@10": 0.3, "de/recall@100": None}})
    display.on_step_end(ROW | {"step": 12_345})
    display.on_train_end(None)


def test_a_run_on_a_terminal_of_80_columns(place):
    """On a pseudo-terminal: a header, a bar of one line, tables of evaluations."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(theirs, "w", encoding="utf-8") as stream:
        assert stream.isatty()
        show_a_run(place, stream)
        os.set_blocking(ours, False)
        text = os.read(ours, 1 << 20).decode()
    os.close(ours)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text))
    assert lines[:4] == [f"model   {place / 'base'}", "task    embedding", "device  cpu", f"folder  {place}"]
    assert max(map(len, lines[4:])) <= 80
    assert "plan    20,000 steps of 8 examples, evaluated every 2, saved every 2" in lines
    (last,) = {line for line in lines if line.startswith("12345/20000")}
    assert re.fullmatch(r"12345/20000 \S{4,} +loss 12.500  pos 0.50  neg 0.25  123,456 tok/s  ETA \S+ *", last)
    assert "step 2/20000  skipped: its loss or gradient is not finite" in lines
    cells = [re.findall(r"[^\s\u2502]+", line) for line in lines]
    assert ["ndcg@10", "0.2500"] in cells
    assert ["ndcg@10", "0.3000", "+0.0500"] in cells
    assert ["de/recall@100", "not", "finite"] in cells


def test_a_redirected_run_is_a_line_for_each_row(place):
    stream = io.StringIO()
    show_a_run(place, stream)
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["model", "task", "device", "folder", "plan"]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d step ", line) for line in lines[5:])
    first, skipped, evaluation, *_ = (line.split(maxsplit=2)[2] for line in lines[5:])
    assert re.fullmatch(
        r"step 1/20000  loss 12.500  pos 0.50  neg 0.25  masked 1.0%  grad 1.00  lr 1.0e-03  123,456 tok/s  "
        r"ETA \S+  mem [\d,]+ MB", first,
    )  # fmt: skip
    assert skipped == "step 2/20000  skipped: its loss or gradient is not finite"
    assert evaluation == "step 2/20000  evaluation  ndcg@10 0.2500  de/recall@100 0.5000"


@pytest.mark.parametrize("option", ["--json", "--quiet"])
def test_options_of_the_command_line(place, capsys, option):
    path = place / "run.json"
    path.write_text(config(place).model_dump_json())
    assert main(["train", str(path), option]) == 0
    output = capsys.readouterr()
    final = place / "run" / "final"
    if option == "--quiet":
        assert (output.out, output.err) == (f"trained 4 steps; the model is in {final}\n", "")
        return
    *rows, last = map(json.loads, output.out.splitlines())
    assert rows == [json.loads(line) for line in (place / "run" / "metrics.jsonl").open()]
    assert last == {"steps": 4, "folder": str(final), "best": None}
    assert "step 1" not in output.err


def test_an_unknown_progress_is_refused(place):
    with pytest.raises(ConfigError, match="progress must be 'auto', 'json' or 'off', got 'loud'"):
        pyqemb.train(config(place), progress="loud")


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
