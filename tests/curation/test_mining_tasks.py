"""Mining by tasks: the bytes of `pyqemb mine`, exact merging, and what is refused."""

import hashlib
import json
import os
import random
import re
import signal
from pathlib import Path

import numpy as np
import pytest

import pyqemb
from pyqemb.cli import main
from pyqemb.curation import mine_task, mining_tasks
from pyqemb.curation.mining_tasks import merge
from pyqemb.data.example import read_examples, write_examples
from pyqemb.data.sealed import seal, unseal
from pyqemb.errors import ConfigError, DataError
from pyqemb.jobs.folder import digest_of
from pyqemb.jobs.parts import VectorPart


class Random:
    """A vector for each text, from its hash; some texts have one vector, so that scores are equal."""

    fingerprint = "random"
    calls = 0

    def encode_query(self, texts, instruction=None):
        type(self).calls += len(texts)
        return np.stack([self.vector(f"{instruction} {text}") for text in texts])

    def encode_document(self, texts):
        type(self).calls += len(texts)
        return np.stack([self.vector(text.replace("twin", "document")) for text in texts])

    def vector(self, text):
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        vector = np.random.default_rng(seed).standard_normal(24).astype(np.float32)
        return vector / np.linalg.norm(vector)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Pairs with repeated queries, instructions and positives, a corpus with twins and repeated texts, small parts."""
    dice = random.Random(0)
    pairs = [
        {"query": f"query {dice.randrange(150)}", "positive": f"document {dice.randrange(400)}"}
        | ({"instruction": f"task {i % 3}"} if i % 3 else {})
        for i in range(230)
    ]
    pairs.insert(5, {"query": "a", "positive": "b", "score": 0.5, "task": "sts"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    corpus = [f"{dice.choice(['document', 'twin', 'other'])} {dice.randrange(500)}" for _ in range(900)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus))
    for name, value in (("ROWS", 32), ("SHARD", 5), ("TILE", 50), ("TILES", 2), ("BLOCK", 2)):
        monkeypatch.setattr(mining_tasks, name, value)
    monkeypatch.setattr("pyqemb.curation.mining._TILE", 50)
    monkeypatch.setattr(mining_tasks, "open_encoder", lambda model: Random())
    monkeypatch.setattr(Random, "calls", 0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def work(tasks, order, out="mined.jsonl", **options):
    """Both rounds of all tasks, each in an order of its own."""
    options = {"corpus": "corpus.jsonl", **options}
    rounds = [[mine_task("m", "pairs.jsonl", out, tasks=tasks, task=task, **options) for task in tasks_of_round]
              for tasks_of_round in order]  # fmt: skip
    assert [done.missing for done in rounds[1]] == [0] * tasks
    return rounds


def alone(out="alone.jsonl", **options):
    corpus = [json.loads(line)["text"] for line in Path("corpus.jsonl").read_text().splitlines()]
    mined = pyqemb.mine(Random(), "pairs.jsonl", corpus=corpus, **options)
    write_examples(out, mined.examples)
    return mined


@pytest.mark.parametrize(
    "options",
    [
        dict(k=3), dict(k=3, depth=5, max_positive_ratio=None), dict(k=5, max_positive_ratio=1.5, skip_top=20),
        dict(k=4, mean_margin=0.05, margin=0.01, max_positive_ratio=None), dict(k=2, max_score=0.3, depth=1000),
        dict(k=4, sampling="random", seed=3, max_positive_ratio=None), dict(k=4, sampling="softmax", depth=30),
        dict(k=2, instruction="Find"),
    ],
    ids=str,
)  # fmt: skip
def test_the_bytes_of_one_process(place, options):
    expected = alone(**options)
    dice = random.Random(str(options))
    work(3, [dice.sample(range(3), 3), dice.sample(range(3), 3)], **options)
    found = pyqemb.finish("mined.jsonl")
    assert (place / "mined.jsonl").read_bytes() == (place / "alone.jsonl").read_bytes()
    assert found.report == expected.report
    assert found.examples == expected.examples
    assert not (place / "mined.jsonl.parts").exists()
    assert not list(place.glob(".*"))


@pytest.mark.parametrize("tasks", [1, 7, pytest.param(60, marks=pytest.mark.deep)])
def test_any_number_of_tasks(place, tasks):
    alone(k=2, max_positive_ratio=None)
    work(tasks, [range(tasks), range(tasks)], k=2, max_positive_ratio=None)
    pyqemb.finish("mined.jsonl")
    assert (place / "mined.jsonl").read_bytes() == (place / "alone.jsonl").read_bytes()


def test_every_text_is_encoded_once(place):
    rounds = work(4, [range(4), range(4)])
    documents = rounds[0][0].documents
    rows = [row for row in read_examples("pairs.jsonl") if row.task != "sts"]
    assert Random.calls == documents + len({(row.query, row.instruction) for row in rows})
    first = [done.missing for done in rounds[0]]
    assert first == sorted(first, reverse=True)
    assert first[-1] == 0  # the last task sees all vectors, and searches at once
    assert [done.searches for done in rounds[0]] == [0, 0, 0, rounds[1][3].searches]
    calls = Random.calls
    work(3, [range(3), range(3)])  # with another number of tasks, nothing is left to do
    assert Random.calls == calls
    pyqemb.finish("mined.jsonl")


def test_the_corpus_is_read_once_by_each_task(place, monkeypatch):
    reads, real = [], mining_tasks.read_corpus
    monkeypatch.setattr(mining_tasks, "read_corpus", lambda path: reads.append(path) or real(path))
    work(2, [range(2), range(2)])
    assert len(reads) == 2
    pyqemb.finish("mined.jsonl")
    assert len(reads) == 3


def test_without_a_corpus(place):
    mined = pyqemb.mine(Random(), "pairs.jsonl", k=2)
    work(2, [range(2), range(2)], corpus=None, k=2)
    assert pyqemb.finish("mined.jsonl").examples == mined.examples


def test_merging_is_exact():
    dice = np.random.default_rng(0)
    for _ in range(200):
        count, k = int(dice.integers(1, 30)), int(dice.integers(1, 9))
        scores = dice.choice(np.float32([-1, -0.5, 0, 0, 0.25, 1, -np.inf]), (3, count))
        cut = int(dice.integers(0, count + 1))
        halves = []
        for start, end in ((0, cut), (cut, count)):
            order = np.argsort(-scores[:, start:end], axis=1, kind="stable")
            halves += [np.take_along_axis(scores[:, start:end], order, 1)[:, :k], (order + start)[:, :k]]
        found, indices = merge(*halves, k)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(indices, order)
        np.testing.assert_array_equal(found, np.take_along_axis(scores, order, 1))


def test_what_is_missing_and_damaged(place, caplog):
    mine_task("m", "pairs.jsonl", "mined.jsonl", tasks=2, task=0, corpus="corpus.jsonl")
    with pytest.raises(
        DataError, match=r"mined\.jsonl\.parts: \d+ of \d+ parts are missing .*; run tasks 0-1 of 2 aga"
    ):
        pyqemb.finish("mined.jsonl")
    alone()
    for task in (1, 0):
        mine_task("m", "pairs.jsonl", "mined.jsonl", tasks=2, task=task, corpus="corpus.jsonl")
    folder = place / "mined.jsonl.parts"
    for name in ("search-00000003.npy", "search-00000003.indices", "search-00000003.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1] + b"?")
        with pytest.raises(DataError, match=r"1 of .* parts are missing or damaged: 3; run task "):
            pyqemb.finish("mined.jsonl")
    for task in (0, 1):
        mine_task("m", "pairs.jsonl", "mined.jsonl", tasks=2, task=task, corpus="corpus.jsonl")
    assert "search-00000003" in caplog.text
    vectors = folder / "documents-00000001.npy"
    whole = vectors.read_bytes()
    (folder / "search-00000000.npy").unlink()
    vectors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for words in (r"documents-00000001\.npy: damaged: .*; run all tasks again, first to encode, then to search", None):
        done, failed = [], []
        for task in (0, 1):
            try:
                done.append(mine_task("m", "pairs.jsonl", "mined.jsonl", tasks=2, task=task, corpus="corpus.jsonl"))
            except DataError as error:
                failed.append(str(error))
        assert len(failed) == (words is not None)
        assert not failed or re.search(words, failed[0])
    mine_task("m", "pairs.jsonl", "mined.jsonl", tasks=2, task=0, corpus="corpus.jsonl")
    assert vectors.read_bytes() == whole
    pyqemb.finish("mined.jsonl")
    assert (place / "mined.jsonl").read_bytes() == (place / "alone.jsonl").read_bytes()


def test_parts_of_another_job(place, monkeypatch):
    options = dict(tasks=2, corpus="corpus.jsonl", k=2)
    mine_task("m", "pairs.jsonl", "mined.jsonl", task=0, **options)
    for change, words in (
        (dict(k=3), "k was 2, now 3"), (dict(depth=50), "depth was 100, now 50"), (dict(seed=1), "seed was 0, now 1"),
        (dict(instruction="x"), "instruction was None, now 'x'"), (dict(corpus=None), "corpus was '.*', now None"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"mined\.jsonl\.parts: holds parts of another job \({words}"):
            mine_task("m", "pairs.jsonl", "mined.jsonl", task=1, **{**options, **change})
    with monkeypatch.context() as patch:
        patch.setattr(Random, "fingerprint", "another")
        with pytest.raises(ConfigError, match="fingerprint was 'random', now 'another'"):
            mine_task("m", "pairs.jsonl", "mined.jsonl", task=1, **options)
    for task in (1, 0):
        mine_task("m", "pairs.jsonl", "mined.jsonl", task=task, **options)
    with (place / "corpus.jsonl").open("a") as file:
        file.write('{"text": "new"}\n')
    with pytest.raises(ConfigError, match="inputs was"):
        mine_task("m", "pairs.jsonl", "mined.jsonl", task=1, **options)
    with pytest.raises(DataError, match=r"pairs\.jsonl: the inputs have changed since the parts in .* were begun"):
        pyqemb.finish("mined.jsonl")


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"k": 0}, {"k": "3"}, {"depth": None}, {"examples": 3}, {"corpus": 3}, {"columns": []},
     {"rows per part": 0}, {"rows per part": "32"}, {"examples per tile": -1}, {"seed": -1}, {"seed": True},
     {"split": 3}, {"documents": 0}, {"documents": "9"}, {"documents": None}],
    ids=str,
)  # fmt: skip
def test_manifests_of_another_version(place, change):
    mine_task("m", "pairs.jsonl", "mined.jsonl", tasks=1, task=0)
    folder = place / "mined.jsonl.parts"
    facts, output = (unseal((folder / name).read_bytes(), name) for name in ("manifest.json", "output.json"))
    (output["settings"] if "documents" in change else facts).update(change)
    (folder / "manifest.json").write_bytes(seal(facts))
    (folder / "output.json").write_bytes(seal({**output, "job": digest_of(facts)}))
    with pytest.raises(DataError, match=r"mined\.jsonl\.parts: its manifest is of another version of pyqemb, or damag"):
        pyqemb.finish("mined.jsonl")


def test_what_is_refused(place, capsys):
    options = dict(tasks=2, task=0)
    (place / "folder").mkdir()
    for examples, out, more, error, words in (
        ("pairs.jsonl", "mined.jsonl", dict(task=2), ConfigError, "task must lie in 0..1 for 2 tasks, got 2"),
        ("pairs.jsonl", "pairs.jsonl", {}, ConfigError, "out: pairs.jsonl is also an input"),
        ("pairs.jsonl", "folder/mined.jsonl", dict(corpus="folder"), ConfigError, "is inside of an input"),
        ("pairs.jsonl", "mined.csv", {}, ConfigError, "mined.csv"),
        ("no.jsonl", "mined.jsonl", {}, DataError, "no.jsonl: no such file or folder"),
        ("pairs.jsonl", "mined.jsonl", dict(corpus="no.jsonl"), DataError, "no.jsonl: no such file or folder"),
        ("hub://a/b", "mined.jsonl", {}, ConfigError, "tasks read files and folders"),
        ("pairs.jsonl", "mined.jsonl", dict(k=8, depth=7), ConfigError, "depth must be at least k"),
        ("pairs.jsonl", "mined.jsonl", dict(columns={"query": "q"}), (ConfigError, DataError), "q"),
    ):
        with pytest.raises(error, match=words):
            mine_task("m", examples, out, **{**options, **more})
    job = ["mine", "m", "pairs.jsonl", "--out", "mined.jsonl", "--tasks", "2", "--task", "0"]
    for option in (["--reranker", "r"], ["--approximate", "HNSW32"], ["--cache", "c"], ["--by-language"]):
        assert main([*job, *option]) == 2
        assert f"{option[0]} is not possible with --tasks" in capsys.readouterr().err
    (place / "a\nb.jsonl").write_text('{"query": "q", "positive": "p"}\n')
    with pytest.raises(ConfigError, match="tasks need inputs whose names can be printed"):
        mine_task("m", "a\nb.jsonl", "mined.jsonl", **options)
    assert not list(place.glob("*.parts"))


def test_the_command_line_and_a_real_model(place, monkeypatch, capsys):
    """With the vectors of `pyqemb mine --cache`, bit by bit: it encodes as many texts at a time."""
    from pyqemb.model import cached_encoder
    from pyqemb.model.encoder import open_encoder
    from pyqemb.testing.tiny import tiny_embedder

    monkeypatch.setattr(mining_tasks, "open_encoder", open_encoder)
    monkeypatch.setattr(cached_encoder, "_CHUNK", 32)
    tiny_embedder(seed=1, initializer_range=0.2).save_pretrained("real")
    job = ["mine", "real", "pairs.jsonl", "--corpus", "corpus.jsonl", "--k", "3", "--quiet"]
    assert main([*job, "--cache", "cache", "--out", "alone.jsonl"]) == 0
    said = capsys.readouterr().out.replace("fewer than 3", "fewer than k").replace("alone", "mined")
    for task in (1, 0, 1):
        assert main([*job, "--out", "mined.jsonl", "--tasks", "2", "--task", str(task)]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = (
        r"task 1 of 2: encoded; vectors of other tasks are missing \(\d+ parts\); when all tasks have encoded, run them"
    )
    assert re.match(words, lines[0])
    again = "searched; when all tasks have searched, run pyqemb finish mined.jsonl"
    assert lines[1:] == [f"task 0 of 2: {again}", f"task 1 of 2: {again}"]
    assert main(["finish", "mined.jsonl"]) == 0
    assert capsys.readouterr().out == said
    assert (place / "mined.jsonl").read_bytes() == (place / "alone.jsonl").read_bytes()


@pytest.mark.promise("R1", "a mining job of 3 tasks, one of them killed while it encodes and again while it searches")
@pytest.mark.parametrize("kind", ["documents", "search"])
def test_a_task_that_is_killed(place, kind):
    alone(k=2)
    if kind == "search":
        for task in range(3):
            mine_task("m", "pairs.jsonl", "mined.jsonl", tasks=3, task=task, corpus="corpus.jsonl", k=2)
        for path in (place / "mined.jsonl.parts").glob("search-*"):
            path.unlink()
    child = os.fork()
    if child == 0:
        real, made = VectorPart.write_files, []

        def write_files(part, files):
            if part.path.name.startswith(kind):
                made.append(part)
                if len(made) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
            real(part, files)

        VectorPart.__bases__[0].write_files = write_files
        mine_task("m", "pairs.jsonl", "mined.jsonl", tasks=3, task=1, corpus="corpus.jsonl", k=2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(list((place / "mined.jsonl.parts").glob(f"{kind}-*.npy"))) == 1
    work(3, [(2, 1, 0), (1, 2, 0)], k=2)
    pyqemb.finish("mined.jsonl")
    assert (place / "mined.jsonl").read_bytes() == (place / "alone.jsonl").read_bytes()
