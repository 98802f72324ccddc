"""The plan of a mining job: exact where it can be, and nothing is written."""

import json

import numpy as np
import pytest

import pyqemb
from pyqemb.cli import main
from pyqemb.curation import mine_task, mining_plan, mining_tasks, plan_mine
from pyqemb.errors import ConfigError, DataError
from pyqemb.model.embedder import Embedder
from pyqemb.testing.tiny import tiny_embedder


@pytest.fixture
def place(tmp_path, monkeypatch):
    tiny_embedder().save_pretrained(tmp_path / "m")
    pairs = [{"query": f"query {i % 50}", "positive": f"a longer document {i}", "instruction": f"task {i % 2}"}
             for i in range(90)]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": f"other {i}"}) + "\n" for i in range(200)))
    for name, value in (("ROWS", 32), ("SHARD", 5), ("TILE", 50)):
        monkeypatch.setattr(mining_tasks, name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_sizes_are_those_of_the_job(place):
    before = sorted(place.rglob("*"))
    plan = plan_mine("m", "pairs.jsonl", "mined.jsonl", corpus="corpus.jsonl", tasks=3, depth=20)
    assert sorted(place.rglob("*")) == before
    assert (plan.examples, plan.queries, plan.documents, plan.tasks) == (90, 50, 290, 3)
    assert plan.is_estimate
    for task in (0, 1, 2, 0, 1, 2):
        mine_task("m", "pairs.jsonl", "mined.jsonl", corpus="corpus.jsonl", tasks=3, task=task, depth=20)
    folder = place / "mined.jsonl.parts"
    vectors, searches = list(folder.glob("[dq]*.npy")), list(folder.glob("search*.npy"))
    assert (plan.parts, plan.searches) == (len(vectors), len(searches))
    files = [*vectors, *searches, *folder.glob("*.indices")]
    headers = 128 * (len(vectors) + len(searches))
    assert plan.disk == sum(path.stat().st_size for path in files) - headers
    pyqemb.finish("mined.jsonl")


def test_tokens_are_those_of_the_model(place):
    model = Embedder.from_pretrained("m")
    queries, positives = [f"query {i}" for i in range(50)], [f"a longer document {i}" for i in range(90)]
    wanted = [
        model.tokenizer.encode_queries(queries[::2], "task 0"), model.tokenizer.encode_queries(queries[1::2], "task 1"),
        model.tokenizer.encode_documents([model.prompts.get("document", "") + text for text in positives]),
    ]  # fmt: skip
    plan = plan_mine("m", "pairs.jsonl", "mined.jsonl")
    assert not plan.is_estimate
    assert plan.tokens == pytest.approx(sum(len(ids) for some in wanted for ids in some), rel=0.02)
    assert plan.tokens_per_second == pytest.approx(plan.tokens / plan.encode_seconds)
    assert plan.search_seconds == pytest.approx(90 * 90 / plan.scores_per_second)
    assert plan.memory > 50e6


class Plain:
    """A model that counts no tokens."""

    def encode_query(self, texts, instruction=None):
        return np.ones((len(texts), 4), np.float32) / 2

    encode_document = encode_query


def test_a_model_that_counts_no_tokens(place, monkeypatch):
    monkeypatch.setattr(mining_plan, "open_encoder", lambda model: Plain())
    plan = plan_mine("m", "pairs.jsonl", "mined.jsonl", corpus="corpus.jsonl")
    assert plan.tokens is plan.tokens_per_second is None
    assert plan.lines()[2].startswith("encode  about 0:00:0")


def test_no_more_tasks_search_than_there_are_parts(place):
    plan = plan_mine("m", "pairs.jsonl", "mined.jsonl", tasks=100)
    assert plan.searches == 2
    assert plan.search_seconds == pytest.approx(90 * 90 / plan.scores_per_second / 2)


def test_what_is_refused(place, monkeypatch, capsys):
    for examples, options, error, words in (
        ("no.jsonl", {}, DataError, "no.jsonl: no such file"),
        ("pairs.jsonl", dict(corpus="no.jsonl"), DataError, "no.jsonl: no such file"),
        ("pairs.jsonl", dict(seconds=0.0), ConfigError, "seconds must be above 0"),
        ("hub://a/b", {}, ConfigError, "tasks read files and folders"),
    ):
        with pytest.raises(error, match=words):
            plan_mine("m", examples, "mined.jsonl", **options)
    job = ["mine", "m", "pairs.jsonl", "--out", "mined.jsonl", "--dry-run"]
    assert main([*job, "--by-language"]) == 2
    assert "--by-language is not possible with --dry-run" in capsys.readouterr().err
    assert main([*job, "--tasks", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["texts", "parts", "encode", "search", "memory", "disk"]
    assert lines[0] == "texts   90 examples, 50 queries, 90 documents"
    assert lines[2].endswith("with 4 tasks")
    monkeypatch.setattr(mining_plan, "free_space", lambda path: 1000)
    assert plan_mine("m", "pairs.jsonl", "mined.jsonl").lines()[-1].endswith("1.0 KB are free; this is too little")
    assert not list(place.glob("*.parts"))
