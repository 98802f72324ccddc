"""The whole recipe in a minute: every step of the demo on a small part of its data."""

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

import pyqemb
from pyqemb.cli import main
from pyqemb.demo.ask import ask
from pyqemb.demo.help_data import help_material
from pyqemb.demo.own_data import own_material
from pyqemb.demo.pipeline import Settings, run_demo
from pyqemb.demo.python_data import functions_of
from pyqemb.demo.report import render
from pyqemb.errors import ConfigError, DataError

TINY = replace(Settings().quick(), steps_stage1=8, steps_stage2=40, runs=2, rate_stage2=1e-2)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    material = help_material(pages=60)
    return out, run_demo(material, out, TINY, say=lambda text: None), material


def test_every_row_of_the_table_is_there_and_training_helps(demo):
    out, results, _ = demo
    names = [
        "untrained",
        "BM25",
        "stage 1 alone",
        "stage 2 alone",
        "stage 1 + 2, run 1",
        "stage 1 + 2, run 2",
        "merged",
    ]
    assert [row.name for row in results.rows] == names
    assert results.mean("stage 2 alone").value > results.mean("untrained").value
    for row in results.rows:
        for corpus in row.scores.values():
            assert set(corpus) == {"de", "fr", "ja", "zh", "mean", "title"}
            assert all(0 <= s.low <= s.value <= s.high <= 1 for metrics in corpus.values() for s in metrics.values())
    assert json.loads((out / "results.json").read_text())["rows"][-1]["name"] == "merged"
    assert "| merged |" in (out / "table.md").read_text()


def test_report_stands_alone(demo):
    out, results, _ = demo
    report = (out / "report.html").read_text()
    assert len(report.encode()) < 2_000_000
    assert re.search(r"The merged model reaches nDCG@10 0\.\d{3} \[.*\(untrained: 0\.\d{3}, BM25: ", report)
    root = ElementTree.fromstring(report.removeprefix("<!DOCTYPE html>\n"))
    assert not [e for e in root.iter() if e.tag in ("script", "link", "iframe")]
    assert not re.search(r"""(src|href)=["']https?:""", report)
    results.facts["<script>alert(1)</script>"] = "<b>&"
    assert "<script>" not in render(results)
    assert "&lt;b&gt;&amp;" in render(results)
    del results.facts["<script>alert(1)</script>"]


def test_model_answers_and_loads_in_sentence_transformers(demo, monkeypatch):
    out, results, material = demo
    assert len({answer.text for answer in ask(out, "Wie drucke ich ein Dokument?", 3)}) == 3
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from sentence_transformers import SentenceTransformer

    texts = [question.text for question in material.questions[:40]]
    theirs = SentenceTransformer(results.model, device="cpu").encode(texts)
    ours = pyqemb.Embedder.from_pretrained(results.model).encode(texts)
    assert np.abs(theirs - ours).max() < 1e-5


def test_ask_without_a_demo(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--ask", "Hello?"]) == 2
    assert "run `pyqemb demo" in capsys.readouterr().err


def test_ask_nothing(demo):
    with pytest.raises(ConfigError, match="empty text"):
        ask(demo[0], "  ")


def test_own_data(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text('{"_id": "1", "text": "an answer"}\n{"_id": "2", "text": "another"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "a question"}\n')
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t1\t1\n")
    train = tmp_path / "train.jsonl"
    train.write_text(
        '{"query": "a question", "positive": "x"}\n{"query": "other", "positive": "a longer text, cut in two."}\n'
    )
    material = own_material(train, tmp_path)
    assert [pair.query for pair in material.supervised] == ["other"]
    assert material.weak
    assert material.questions[0].answers == {"an answer"}
    train.write_text('{"query": "a question", "positive": "x"}\n')
    with pytest.raises(DataError, match="nothing is left to train on"):
        own_material(train, tmp_path)
    assert main(["demo", "--train", str(train)]) == 2


def test_functions_are_read_not_run():
    code = 'raise SystemExit\ndef add(a, b):\n    """Add two numbers together.\n\n    More."""\n    return a + b\n'
    (function,) = functions_of(code, library="x", file="y.py")
    assert function.summary == "Add two numbers together."
    assert '"""' not in function.source
    assert "return a + b" in function.source
