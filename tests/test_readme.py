"""Every block of README.md runs as it stands, in order, on tiny models under the names of real ones and tiny data."""

import json
import re
import shutil
from pathlib import Path

import pytest

from pyqemb.testing.tiny import write_tiny_folder

README = (Path(__file__).parent.parent / "README.md").read_text()
SETS_UP = ("git clone ", "pip install ")


def test_every_block_runs(tmp_path, monkeypatch, capsys, run_line):
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
                line = line.partition(" #")[0].strip().replace("--nproc-per-node 8", "--nproc-per-node 2")
                if not line.startswith(SETS_UP):
                    run_line(line)
        else:
            assert language == "text"
    assert "value" in capsys.readouterr().out  # of nDCG@10
    assert Path("ready", "modules.json").is_file()


def test_prose_has_at_most_100_columns():
    assert [line for line in README.splitlines() if len(line) > 100] == []
