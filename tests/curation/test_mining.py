"""Mining against a slow truth, and what it keeps on disk."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

import pyqemb
from pyqemb import mine
from pyqemb.cli import main
from pyqemb.curation.corpus import read_corpus
from pyqemb.curation.mining import search_negatives
from pyqemb.curation.rules import Rules
from pyqemb.data.example import Example
from pyqemb.errors import ConfigError, DataError
from pyqemb.model.cached_encoder import CachedEncoder, fingerprint
from pyqemb.testing.tiny import TEXTS, tiny_embedder


class Circle:
    """Texts end in an angle in degrees; the score of two is the cosine between them."""

    fingerprint = "circle"

    def __init__(self):
        self.encoded = []

    def encode_query(self, texts, instruction=None):
        self.encoded += texts
        angles = np.radians([float(text.split()[-1]) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    encode_document = encode_query


def slow(queries, rows, documents, rules, spared, positives):
    """Sorting everything, one query at a time, in float64."""
    found = []
    for row, own, others in zip(rows, positives, spared, strict=True):
        scores = documents.astype(np.float64) @ queries[row].astype(np.float64)
        others = others[others >= 0]
        ceiling = rules.ceilings(scores[[own]].astype(np.float32), np.array([scores[others].mean()], np.float32))[0]
        order = [i for i in np.argsort(-scores, kind="stable") if i not in others and scores[i] <= ceiling]
        found.append(order[rules.skip_top :][: rules.k])
    return found


RULES = [
    Rules(k=3), Rules(k=3, max_positive_ratio=None), Rules(k=5, margin=0.2), Rules(k=2, max_score=0.1),
    Rules(k=4, skip_top=6, max_positive_ratio=1.1), Rules(k=3, max_positive_ratio=None, mean_margin=0.05),
    Rules(k=30, depth=30),
]  # fmt: skip


@pytest.fixture
def vectors():
    generator = np.random.default_rng(0)
    queries, documents = (generator.standard_normal((n, 16)).astype(np.float32) for n in (60, 300))
    queries, documents = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, documents))
    rows = generator.integers(0, 60, 100)
    spared = np.where(generator.random((100, 3)) < 0.6, generator.integers(0, 300, (100, 3)), -1)
    positives = generator.integers(0, 300, 100)
    spared[:, 0] = positives
    return queries, rows, documents, spared, positives


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("approximate", [None, "Flat"])
def test_equals_sorting(vectors, rules, approximate):
    if approximate:
        pytest.importorskip("faiss", reason="faiss-cpu is not installed (pip install 'pyqemb[mine]')")
    queries, rows, documents, spared, positives = vectors
    found = search_negatives(
        queries,
        rows,
        documents,
        rules,
        spared,
        positives,
        generator=np.random.default_rng(0),
        approximate_by=approximate,
    )
    truth = slow(queries, rows, documents, rules, spared, positives)
    for indices, scores, wanted, row in zip(found.indices, found.scores, truth, rows, strict=True):
        assert indices[indices >= 0].tolist() == wanted
        np.testing.assert_allclose(scores[: len(wanted)], documents[wanted] @ queries[row], atol=1e-6)
        assert np.isneginf(scores[len(wanted) :]).all()


def test_a_pool_of_its_own():
    examples = [Example("q 0", "en 5"), Example("q 0", "de 9"), Example("q 55", "de 60")]
    corpus = ["en 20", "de 30", "fr 1", "en 40", "de 70"]
    mined = pyqemb.mine(Circle(), examples, corpus=corpus, k=2, max_positive_ratio=None, pool_of=lambda text: text[:2])
    assert [e.negatives for e in mined.examples] == [("en 20", "en 40"), ("de 30", "de 60"), ("de 70", "de 30")]


def test_a_reranker_decides():
    def reranker(pairs):
        """Likes even angles; the positive is 40."""
        assert len(set(pairs)) == len(pairs), "a pair is scored twice"
        angles = np.array([float(text.split()[-1]) for _, text in pairs])
        return np.where(angles % 20 == 0, 1.0, 0.1) - angles / 1000

    examples, corpus = (
        [Example("q 0", "d 40"), Example("q 1", "d 40")],
        ["d 20", "d 30", "d 50", "d 60", "d 80", "d 179"],
    )
    mined = pyqemb.mine(Circle(), examples, corpus=corpus, k=3, depth=5, max_positive_ratio=0.999, reranker=reranker)
    # 20 scores above the positive (0.98 > 0.96), 179 is not among the five nearest.
    assert [e.negatives for e in mined.examples] == [("d 60", "d 80", "d 30")] * 2
    assert mined.report.positive_score == pytest.approx(0.96)


def test_nothing_found_has_no_mean(tmp_path, monkeypatch, capsys):
    """With a reranker that scores no document below the positive."""
    examples = [Example("q 0", "d 5"), Example("q 10", "d 20")]
    options = {"k": 1, "max_positive_ratio": 0.5, "reranker": lambda pairs: np.ones(len(pairs), dtype=np.float32)}
    mined = pyqemb.mine(Circle(), examples, **options)
    assert (mined.report.positive_score, mined.report.negative_score) == (None, None)
    assert repr(mined) == (
        "Mined(2 examples from 2 documents; no row has a negative; 2 examples with fewer than k negatives)"
    )
    pyqemb.write_examples(tmp_path / "rows.jsonl", examples)
    monkeypatch.setattr("pyqemb.model.encoder.open_encoder", lambda *_: Circle())
    monkeypatch.setattr("pyqemb.model.encoder.open_reranker", lambda *_: options["reranker"])
    argv = [
        "mine",
        "m",
        str(tmp_path / "rows.jsonl"),
        "--out",
        str(tmp_path / "out.jsonl"),
        "--max-positive-ratio",
        "0.5",
    ]
    assert main([*argv, "--reranker", "r", "--quiet"]) == 0
    assert "no row has a negative" in capsys.readouterr().out


def test_vectors_are_kept(tmp_path):
    examples, corpus = [Example("q 0", "d 5"), Example("q 10", "d 20")], ["d 40", "d 70"]
    first = pyqemb.mine(Circle(), examples, corpus=corpus, k=1, cache=tmp_path)
    model = Circle()
    again = pyqemb.mine(model, examples, corpus=[*corpus, "d 41", "d 40"], k=1, cache=tmp_path)
    assert model.encoded == ["d 41"]
    assert again.examples == first.examples
    cached = CachedEncoder(Circle(), tmp_path)
    assert isinstance(cached.encode_document(["d 5", "d 20", "d 40"]), np.memmap)
    np.testing.assert_array_equal(
        cached.encode_document(["d 70", "d 5", "d 70"]), Circle().encode_document(["d 70", "d 5", "d 70"])
    )
    cached.encode_query(["d 5"], instruction="other")
    assert cached.model.encoded == ["d 5"]  # a query under another instruction is another vector


def test_a_torn_end_is_cut_off(tmp_path):
    CachedEncoder(Circle(), tmp_path).encode_document(["d 5", "d 20"])
    folder = next(tmp_path.iterdir())
    with (folder / "0000.data").open("ab") as file:
        file.write(b"\xff" * 13)
    with (folder / "0000.index").open("ab") as file:
        file.write(b"\xff" * 5)
    model = Circle()
    texts = ["d 5", "d 30", "d 20"]
    np.testing.assert_array_equal(
        CachedEncoder(model, tmp_path).encode_document(texts), Circle().encode_document(texts)
    )
    assert model.encoded == ["d 30"]


def test_another_dimension_is_told(tmp_path):
    CachedEncoder(Circle(), tmp_path).encode_document(["d 5"])

    class Wide(Circle):
        def encode_document(self, texts):
            return np.ones((len(texts), 3), np.float32)

    with pytest.raises(DataError, match="holds vectors of 2 features, the model gives 3"):
        CachedEncoder(Wide(), tmp_path).encode_document(["d 6"])
    with pytest.raises(ConfigError, match="needs a model with weights or an attribute fingerprint, got object"):
        CachedEncoder(object(), tmp_path)


def test_a_fingerprint_is_of_the_weights_and_of_the_settings():
    one, two = tiny_embedder(), tiny_embedder()
    assert fingerprint(one) == fingerprint(two) != fingerprint(tiny_embedder(pooling="mean"))
    two.get_parameter(next(name for name, _ in two.named_parameters())).data[0, 0] += 1e-3
    assert fingerprint(one) != fingerprint(two)


def test_a_real_model_with_a_cache_mines_the_same(tmp_path):
    examples = [Example(text, other, instruction="Find") for text, other in zip(TEXTS[:4], TEXTS[4:8], strict=True)]
    results = [
        pyqemb.mine(tiny_embedder(), examples, k=2, cache=cache).examples for cache in (None, tmp_path, tmp_path)
    ]
    assert results[0] == results[1] == results[2]


def test_a_killed_job_embeds_no_finished_chunk_again(tmp_path):
    program = """
        import sys, time
        import numpy as np
        from pyqemb.model import cached_encoder as vectors
        vectors._CHUNK = 10
        class Slow:
            fingerprint = "slow"
            def encode_document(self, texts):
                print(*texts, sep="\\n", flush=True)
                time.sleep(0.05)
                return np.ones((len(texts), 4), np.float32)
        vectors.CachedEncoder(Slow(), sys.argv[1]).encode_document([str(i) for i in range(200)])
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "cache")]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, stdout=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while (tmp_path / "log").read_text().count("\n") < 60 and job.poll() is None:
            time.sleep(0.02)
        job.send_signal(signal.SIGKILL)
        job.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    before = (tmp_path / "log").read_text().split()
    assert {*before, *done} == {str(i) for i in range(200)}
    assert len(before) >= 60
    assert len({*before} & {*done}) <= 10


def test_corpora(tmp_path):
    def write(name, *rows):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    path = write("b/corpus.jsonl", {"_id": "1", "title": "T", "text": "a"}, {"_id": 2, "text": "b"}, {"text": "c"})
    assert list(read_corpus(path)) == list(read_corpus(path.parent)) == ["T a", "b", "c"]
    assert list(read_corpus(write("e.jsonl", {"query": "q", "positive": "p"}))) == ["p"]
    twice = write("t.jsonl", {"_id": "x", "text": "a"}, {"_id": "y", "text": "b"}, {"_id": "x", "text": "c"})
    with pytest.raises(DataError, match=r"t.jsonl:3: id 'x' is that of line 1 too"):
        list(read_corpus(twice))
    with pytest.raises(DataError, match=r"m.jsonl:2: expected a document under 'text'"):
        list(read_corpus(write("m.jsonl", {"text": "a"}, {"body": "b"})))
    with pytest.raises(DataError, match=r"expected corpus\.jsonl"):
        list(read_corpus(tmp_path))


def test_labels_and_graded_pairs_stay_as_they_are(caplog):
    label = Example("it crashed", "bug report", ("praise",), task="classification")
    graded = Example("a cat", "a dog", task="sts", score=2.0)
    pairs = [Example(f"question {i}", f"answer {i}", task="retrieval") for i in range(5)]
    with caplog.at_level("INFO", logger="pyqemb"):
        mined = mine(tiny_embedder(), [label, *pairs[:2], graded, *pairs[2:]], k=4, max_positive_ratio=None)
    assert [mined.examples[i] for i in (0, 3)] == [label, graded]
    assert mined.report.rows == mined.report.documents == 5
    for place, pair in zip((1, 2, 4, 5, 6), pairs, strict=True):
        others = {other.positive for other in pairs} - {pair.positive}
        assert mined.examples[place].query == pair.query
        assert set(mined.examples[place].negatives) == others
    assert "2 of 7 rows are kept as they are: their task is classification or sts" in caplog.text
    with pytest.raises(DataError, match="every row has the task classification or sts"):
        mine(tiny_embedder(), [label, graded])


def test_what_mining_replaces_is_said(caplog):
    examples = [
        Example("q 0", "a 1", ("n 5",), scores=(1.0, 0.5)),
        Example("r 90", "b 91"),
        Example("s 40", "c 41", ("m 6",)),
    ]
    mined = pyqemb.mine(Circle(), examples, k=1, max_positive_ratio=None)
    assert all(example.scores == () for example in mined.examples)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "mine: the negatives of 2 of 3 rows are replaced by mined ones",
        "mine: the scores of 1 of 3 rows are dropped: they belong to other negatives",
    ]
    caplog.clear()
    pyqemb.mine(Circle(), [Example("q 0", "a 1"), Example("r 90", "b 91")], k=1, max_positive_ratio=None)
    assert not caplog.records
