import json

import numpy as np
import pytest

from pyqemb.errors import DataError
from pyqemb.evaluation import evaluate
from pyqemb.evaluation.tasks import load_task
from pyqemb.testing.tiny import TEXTS, tiny_embedder


class Letters:
    """Vectors that count letters; remembers the instruction of each call."""

    def __init__(self):
        self.instructions = []

    def encode_document(self, texts, dim=None):
        vectors = np.array([[text.count(letter) for letter in "abcd"] for text in texts], dtype=np.float32) + 1e-6
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def encode_query(self, texts, instruction=None, dim=None):
        self.instructions += [instruction] * len(texts)
        return self.encode_document(texts)


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def beir(tmp_path):
    write_lines(tmp_path / "corpus.jsonl", [{"_id": x, "title": "", "text": x * 3} for x in "abcd"])
    write_lines(
        tmp_path / "queries.jsonl",
        [{"_id": "1", "text": "aab"}, {"_id": "2", "text": "cdd", "instruction": "own"}, {"_id": "b", "text": "b"}],
    )
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n1\ta\t1\n2\tc\t2\n2\td\t1\nb\tb\t1\nb\ta\t1\n"
    )
    return tmp_path


def test_retrieval(beir):
    model = Letters()
    report = evaluate(model, beir, instruction="find", bootstrap=50)
    assert report["task"] == "retrieval"
    assert report["count"] == 3
    assert report["per_query"]["accuracy@1"]["1"] == 1
    # d (grade 1) comes before c (grade 2)
    expected = (1 + 2 / np.log2(3)) / (2 + 1 / np.log2(3))
    assert report["per_query"]["ndcg@10"]["2"] == pytest.approx(expected)
    # the document with the query's own id is passed over
    assert report["per_query"]["ndcg@10"]["b"] < 1
    assert sorted(model.instructions) == ["find", "find", "own"]
    assert json.dumps(report)


def test_sts_and_bitext(tmp_path):
    write_lines(
        tmp_path / "sts" / "sts.jsonl",
        [{"sentence1": "aa", "sentence2": x, "score": s} for x, s in (("aa", 5), ("ab", 3), ("bb", 0))],
    )
    report = evaluate(Letters(), tmp_path / "sts", bootstrap=20)
    assert report["task"] == "sts"
    assert report["metrics"]["spearman"]["value"] == pytest.approx(1)
    write_lines(
        tmp_path / "bitext" / "bitext.jsonl", [{"sentence1": x, "sentence2": x * 2} for x in ("a", "b", "c", "a")]
    )
    report = evaluate(Letters(), tmp_path / "bitext", bootstrap=20)
    assert report["metrics"]["accuracy"]["value"] == 1
    assert report["metrics"]["f1"]["value"] == 1


def test_real_model(beir):
    write_lines(beir / "corpus.jsonl", [{"_id": x, "text": t} for x, t in zip("abcd", TEXTS, strict=False)])
    report = evaluate(tiny_embedder(), beir, dim=8, bootstrap=10)
    assert 0 <= report["metrics"]["ndcg@10"]["value"] <= 1


def test_vectors_that_are_not_finite_are_refused(beir):
    class Broken(Letters):
        def encode_document(self, texts, dim=None):
            return np.full((len(texts), 4), np.nan, dtype=np.float32)

    with pytest.raises(DataError, match="NaN or infinity"):
        evaluate(Broken(), beir)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", '{"_id": "a"}\n', "corpus.jsonl:1: 'text' must be text"),
        ("corpus.jsonl", '{"_id": "a", "text": "x"}\n' * 2, "corpus.jsonl:2: the id 'a' occurs twice"),
        ("corpus.jsonl", "", "corpus.jsonl: empty"),
        ("corpus.jsonl", "{", "corpus.jsonl:1:2: not JSON"),
        ("queries.jsonl", '{"text": "x"}\n', "queries.jsonl:1: '_id' must be text"),
        ("qrels/test.tsv", "1\ta\n", "test.tsv:1:1: expected query-id"),
        ("qrels/test.tsv", "h\th\th\n9\ta\t1\n", "test.tsv:2: query '9' is not in queries"),
        ("qrels/test.tsv", "h\th\th\n1\tz\t1\n", "test.tsv:2: document 'z' is not in corpus"),
        ("qrels/test.tsv", "h\th\th\n1\ta\t0\n", "no judgment above 0"),
    ],
)
def test_bad_folders_name_the_place(beir, name, content, message):
    (beir / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_task(beir)


def test_missing_things_are_named(tmp_path, beir):
    with pytest.raises(DataError, match="no such folder"):
        load_task(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected corpus.jsonl .* found none"):
        load_task(tmp_path / "empty")
    with pytest.raises(DataError, match="splits found: test"):
        load_task(beir, "dev")
