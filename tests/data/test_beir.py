"""BEIR folders in each of their layouts, with the oddities that public ones have."""

import bz2
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
import pytrec_eval

from pyqemb.curation.corpus import read_corpus
from pyqemb.curation.decontaminate import evaluation_examples
from pyqemb.data.example import Example, read_examples
from pyqemb.errors import DataError
from pyqemb.evaluation.run import score_rankings
from pyqemb.evaluation.tasks import load_task

CORPUS = [{"_id": "d1", "title": "T", "text": "one"}, {"_id": "d2", "title": "", "text": "two"}]
QUERIES = [{"_id": "q1", "text": "first"}, {"_id": "q2", "text": "second"}]
QRELS = [("q1", "d1", 2), ("q2", "d1", 0), ("q2", "d2", 1)]
GRADES = {"q1": {"d1": 2.0}, "q2": {"d2": 1.0}}


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(bz2.compress(content) if path.suffix == ".bz2" else content)


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)


def judged(rows=QRELS):
    return [dict(zip(("query-id", "corpus-id", "score"), row, strict=True)) for row in rows]


def table(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


HEAD = "query-id\tcorpus-id\tscore\n"
TABS = "".join(f"{q}\t{d}\t{g}\n" for q, d, g in QRELS)


@pytest.fixture
def beir(tmp_path):
    lines(tmp_path / "corpus.jsonl", CORPUS)
    lines(tmp_path / "queries.jsonl", QUERIES)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("test.tsv", HEAD + TABS),
        ("test.tsv", TABS),
        ("test.tsv", "\ufeff" + TABS.replace("\n", "\r\n")),
        ("test.tsv", HEAD + TABS.replace("q1\td1", '"q1"\t"d1"')),
        ("test.tsv", "score\tcorpus-id\tquery-id\n" + "".join(f"{g}\t{d}\t{q}\n" for q, d, g in QRELS)),
        ("test.tsv", "".join(f"{q} 0 {d} {g}\n" for q, d, g in QRELS)),
        ("test.txt", "".join(f"{q}\t0\t{d}\t{g}\n" for q, d, g in QRELS)),
        ("test.jsonl", "".join(json.dumps(row) + "\n" for row in judged())),
        ("test.csv", "query-id,corpus-id,score\n" + "".join(f"{q},{d},{g}\n" for q, d, g in QRELS)),
    ],
)
def test_judgements(beir, name, text):
    table(beir / "qrels" / name, text)
    task = load_task(beir)
    assert task.qrels == GRADES
    assert task.corpus == {"d1": "T one", "d2": "two"}
    assert list(read_examples(beir, "test")) == [Example("first", "T one"), Example("second", "two")]
    assert list(evaluation_examples(beir)) == [Example("first", "T one"), Example("second", "two")]
    assert list(read_corpus(beir)) == ["T one", "two"]


@pytest.mark.parametrize("place", ["qrels", "data", "default"])
@pytest.mark.parametrize("name", ["test-{}-of-00002.parquet", "test/{}.parquet"])
def test_repositories_of_mteb(tmp_path, place, name):
    for number, half in enumerate((slice(0, 1), slice(1, None))):
        file = name.format(f"{number:05}")
        parquet(tmp_path / "corpus" / file.replace("test", "corpus"), CORPUS[half])
        parquet(tmp_path / "queries" / file, [{"id": row["_id"], "text": row["text"]} for row in QUERIES[half]])
        parquet(tmp_path / place / file, judged(QRELS[half]))
    task = load_task(tmp_path)
    assert task.qrels == GRADES
    assert list(task.queries.values()) == ["first", "second"]
    assert list(read_corpus(tmp_path)) == ["T one", "two"]
    parquet(tmp_path / "queries" / "train-00000-of-00001.parquet", [{"id": "q1", "text": "of train"}])
    parquet(tmp_path / place / "train-00000-of-00001.parquet", judged([("q1", "d2", 1)]))
    assert list(read_examples(tmp_path)) == [Example("of train", "two")]
    assert load_task(tmp_path).queries["q1"] == "first"


def test_the_same_judgements_in_two_files(beir, caplog):
    table(beir / "qrels" / "test.tsv", HEAD + TABS)
    lines(beir / "qrels" / "test.jsonl", judged())
    lines(beir / "corpus.jsonl.bz2", CORPUS)
    with pytest.raises(DataError, match=r"corpus\.jsonl\.bz2: exists beside corpus\.jsonl"):
        load_task(beir)
    (beir / "corpus.jsonl").unlink()
    assert load_task(beir).qrels == GRADES
    assert not caplog.records
    table(beir / "qrels" / "test.tsv", HEAD + TABS + "q1\td1\t3\n")
    assert load_task(beir).qrels["q1"] == {"d1": 3.0}
    assert "judged twice with different grades" in caplog.text


def test_absent_texts_are_counted(beir, caplog):
    table(beir / "qrels" / "train.tsv", HEAD + TABS + "q1\td9\t1\nq9\td1\t1\nq2\td8\t1\n")
    task = load_task(beir, "train")
    assert task.qrels == {"q1": {"d1": 2.0, "d9": 1.0}, "q2": {"d2": 1.0, "d8": 1.0}}
    assert set(task.queries) == {
        "q1",
        "q2",
    }
    assert "train.tsv:5: document 'd9' is not in corpus" in caplog.text
    assert "2 judged documents are absent" in caplog.text
    assert "1 judged queries are absent (first:" in caplog.text
    assert "query 'q9' is not in queries" in caplog.text
    assert list(read_examples(beir)) == [Example("first", "T one"), Example("second", "two")]
    assert len(list(evaluation_examples(beir))) == 2


def test_metrics_equal_trec_eval_on_odd_judgements(beir):
    odd = {"q1": {"d1": 1, "d2": -1, "d9": 2}, "q2": {"d1": 0, "d2": -3}}
    table(
        beir / "qrels" / "test.tsv",
        HEAD + "".join(f"{q}\t{d}\t{g}\n" for q, own in odd.items() for d, g in own.items()),
    )
    task = load_task(beir)
    run = {query: {"d2": 2.0, "d1": 1.0} for query in odd}
    names = {"ndcg@10": "ndcg_cut_10", "recall@10": "recall_10", "mrr@10": "recip_rank"}
    truth = pytrec_eval.RelevanceEvaluator(odd, set(names.values())).evaluate(run)
    found = score_rankings({query: ["d2", "d1"] for query in odd}, task.qrels)
    for ours, theirs in names.items():
        assert found[ours] == {query: pytest.approx(scores[theirs]) for query, scores in truth.items()}


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("corpus.jsonl", [*CORPUS, CORPUS[0]], r"corpus\.jsonl:3: the id 'd1' occurs twice; it is that of .*:1 too"),
        ("corpus.jsonl", [{"_id": 1, "text": "a"}, {"_id": "1", "text": "a"}], "the id '1' occurs twice"),
        ("corpus.jsonl", [{"_id": "d1", "title": 3, "text": "a"}], "'title' must be text, got 3"),
        ("queries.jsonl", [*QUERIES, QUERIES[1]], r"queries\.jsonl:3: the id 'q2' occurs twice"),
        ("queries.jsonl", [{"_id": 1.5, "text": "a"}], r"'_id' must be text or an integer, got 1\.5"),
        (
            "queries.jsonl",
            [{"_id": "q1", "text": " "}, QUERIES[1]],
            r"queries\.jsonl:1: the query 'q1' is judged and has",
        ),
        (
            "corpus.jsonl",
            [{"_id": "d1", "text": ""}, CORPUS[1]],
            r"corpus\.jsonl:1: the document 'd1' is judged and has",
        ),
    ],
)
def test_wrong_texts(beir, name, rows, message):
    table(beir / "qrels" / "train.tsv", HEAD + TABS)
    lines(beir / name, rows)
    with pytest.raises(DataError, match=message):
        list(read_examples(beir))


@pytest.mark.parametrize("grade", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("head", ["", HEAD])
def test_grades_are_finite(beir, grade, head):
    table(beir / "qrels" / "test.tsv", f"{head}q1\td1\t{grade}\n{TABS}")
    for read in (
        load_task,
        lambda folder: list(read_examples(folder, "test")),
        lambda folder: list(evaluation_examples(folder)),
    ):
        with pytest.raises(
            DataError, match=rf"test\.tsv:{2 if head else 1}: the grade 'score' must be a finite number"
        ):
            read(beir)


def test_empty_documents_are_measured(beir):
    """Public corpora have some."""
    lines(beir / "corpus.jsonl", [*CORPUS, {"_id": "d3", "text": ""}])
    table(beir / "qrels" / "test.tsv", HEAD + TABS)
    assert load_task(beir).corpus["d3"] == ""


@pytest.mark.parametrize(
    "line", ["q1\td1\tone", "q1\td1\t", "q1\td1\t1x", "q1\tgone\t1_0", "gone\td1\ttwo", "q1 0 d1 one"]
)
def test_a_spoiled_first_line_is_no_header(beir, line):
    table(beir / "qrels" / "test.tsv", f"{line}\n{TABS}")
    with pytest.raises(DataError, match=r"test\.tsv:1:1: expected query-id, corpus-id, score"):
        load_task(beir)
    table(beir / "qrels" / "test.tsv", f"qid\tpid\tgrade\n{TABS}")
    assert load_task(beir).qrels == GRADES


@pytest.mark.parametrize("grade", ["1_0", "\u0661"])
def test_grades_are_digits(beir, grade):
    for name, delimiter in (("test.tsv", "\t"), ("test.csv", ",")):
        table(beir / "qrels" / name, HEAD.replace("\t", delimiter) + delimiter.join(["q1", "d1", grade]) + "\n")
        with pytest.raises(DataError, match=rf"{name}:2"):
            load_task(beir)
        (beir / "qrels" / name).unlink()


def test_a_corpus_in_a_file_and_in_a_folder(beir):
    table(beir / "qrels" / "test.tsv", HEAD + TABS)
    (beir / "corpus").mkdir()
    assert load_task(beir).qrels == GRADES  # an empty folder holds no corpus
    lines(beir / "corpus" / "part.jsonl", CORPUS)
    with pytest.raises(DataError, match=r"corpus/part\.jsonl: exists beside corpus\.jsonl; keep one of them"):
        load_task(beir)


@pytest.mark.parametrize("text", ["", " ", "\u200b"])
def test_empty_queries_are_said(beir, caplog, text):
    """Measured, because public datasets have some; of training they are an error."""
    lines(beir / "queries.jsonl", [{"_id": "q1", "text": text}, QUERIES[1], {"_id": "unjudged", "text": ""}])
    table(beir / "qrels" / "test.tsv", HEAD + TABS)
    assert load_task(beir).qrels == GRADES
    assert "queries.jsonl: 1 judged queries have an empty text (first: " in caplog.text
    with pytest.raises(DataError, match=r"queries\.jsonl:1: the query 'q1' is judged and has an empty text"):
        list(read_examples(beir, "test"))


def test_the_only_judgements_are_read_and_said(beir, caplog):
    table(beir / "qrels" / "dev.tsv", HEAD + TABS)
    assert load_task(beir).qrels == GRADES
    assert "reading split 'dev', the only one there" in caplog.text
    with pytest.raises(DataError, match="no split 'test'; splits found: dev"):
        load_task(beir, "test")
    table(beir / "qrels" / "train.tsv", HEAD + TABS)
    with pytest.raises(DataError, match=r"no split 'test'; splits found: dev, train; choose one: evaluate --split dev"):
        load_task(beir)
    table(beir / "qrels" / "test.tsv", HEAD + "q1\td2\t1\n")
    assert load_task(beir).qrels == {"q1": {"d2": 1.0}}
