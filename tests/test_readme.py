"""Every block of README.md runs as it stands, in order, on tiny models under the names of real ones and tiny data."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyqemb.cli import main
from pyqemb.testing.tiny import write_tiny_folder

README = (Path(__file__).parent.parent / "README.md").read_text()
SETS_UP = ("git clone ", "pip install ")


def test_every_block_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sentence_transformers", reason="export --verify loads the model there")
    monkeypatch.chdir(tmp_path)
    for name in ("Qwen/Qwen3-Embedding-0.6B", "Qwen/Qwen3-0.6B-Base"):
        write_tiny_folder(name)
    rows = [{"query": f"query {i}", "positive": f"document {i * i}"} for i in range(20)]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (Path("dev") / "qrels").mkdir(parents=True)
    corpus = [{"_id": str(i), "text": row["positive"]} for i, row in enumerate(rows)]
    (Path("dev") / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (Path("dev") / "queries.jsonl").write_text('{"_id": "q", "text": "query 3"}\n')
    (Path("dev") / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t3\t1\n")
    Path("run.toml").write_text(
        '[model]\nbase = "Qwen/Qwen3-0.6B-Base"\n[[data]]\npath = "mined.jsonl"\n[save]\ndir = "runs/shell"\n'
    )
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(compile(code, "README.md", "exec"), {})
        elif language == "bash":
            shutil.rmtree("my-model", ignore_errors=True)  # the shell makes it again
            for line in code.splitlines():
                run(line.partition(" #")[0].strip())
        else:
            assert language == "text"
    assert "value" in capsys.readouterr().out  # of nDCG@10
    assert Path("ready", "modules.json").is_file()


def run(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "torchrun":
        two = [word if word != "8" else "2" for word in words[1:]]
        command = [sys.executable, "-m", "torch.distributed.run", *two]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    elif words[0] == "pyqemb":
        assert main(words[1:]) == 0, line
    else:
        assert line.startswith(SETS_UP), f"do not know how to run {line!r}"


def test_prose_has_at_most_100_columns():
    assert [line for line in README.splitlines() if len(line) > 100] == []
