"""Progress of the commands: on a terminal only, not with --quiet; Ctrl-C ends them with one line."""

import contextlib
import json
import os
import re
import signal
import sys
import threading

import pytest

from pyqemb.cli import main
from pyqemb.testing.tiny import write_tiny_folder

COMMANDS = {
    "evaluate": ["evaluate", "model", "rows.jsonl"],
    "mine": ["mine", "model", "rows.jsonl", "--out", "out.jsonl", "--k", "1"],
    "merge": ["merge", "model", "other", "--out", "out"],
    "encode": ["encode", "model", "texts.txt", "--out", "out.npy"],
    "curate": ["curate", "curate.toml"],
}
SHOWN = {"evaluate": "Texts", "mine": "Queries", "merge": "Tensors", "encode": "texts, ", "curate": "reading"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_tiny_folder(tmp_path / "model")
    write_tiny_folder(tmp_path / "other", seed=1)
    rows = [{"query": f"query {i}", "positive": f"positive {i}"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "texts.txt").write_text("\n".join(row["query"] for row in rows))
    (tmp_path / "curate.toml").write_text('input = ["rows.jsonl"]\nout = "out"\n[[step]]\nkind = "exact"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def on_a_terminal(monkeypatch, arguments):
    """The exit code of a command, and what it writes to standard error, a pseudo-terminal."""
    ours, theirs = os.openpty()
    parts = []

    def read():
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while part := os.read(ours, 1 << 16):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setenv("TERM", "xterm")
        code = main(arguments)
    reader.join()
    os.close(ours)
    return code, b"".join(parts).decode()


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_bar_on_a_terminal(place, monkeypatch, verb):
    code, text = on_a_terminal(monkeypatch, COMMANDS[verb])
    assert code == 0
    assert SHOWN[verb] in text


@pytest.mark.parametrize("verb", COMMANDS)
def test_quiet(place, monkeypatch, verb):
    assert on_a_terminal(monkeypatch, [*COMMANDS[verb], "--quiet"]) == (0, "")


@pytest.mark.parametrize("verb", ["evaluate", "mine", "merge"])
def test_ctrl_c_under_a_bar(place, monkeypatch, verb):
    """The bar goes, one line stays, and nothing is half written."""
    before = set(place.rglob("*"))
    monkeypatch.setattr("rich.progress.Progress.advance", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    code, text = on_a_terminal(monkeypatch, COMMANDS[verb])
    assert code == 130
    last = re.split(r"\x1b\[[\d;?]*[A-Za-z]", text)[-1]
    assert re.fullmatch(rf"pyqemb {verb}: stopped by SIGINT; [^\r\n]*\r?\n", last)
    assert set(place.rglob("*")) == before


@pytest.mark.parametrize("verb", COMMANDS)
def test_no_bar_where_standard_error_is_redirected(place, capsys, verb):
    assert main(COMMANDS[verb]) == 0
    assert not re.search(rf"\x1b|{SHOWN[verb]}", capsys.readouterr().err)
