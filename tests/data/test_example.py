"""Rows in and out of JSONL, Parquet and BEIR, and every way in which a file can be wrong."""

import gzip
import json
import lzma
import re

import pytest

from pyqemb.data.example import Example, read_examples, read_lines, write_examples
from pyqemb.errors import DataError

EXAMPLES = [
    Example("q1", "p1"),
    Example("Größe?", "幅", ("n1", "n\n2"), "Find", "demo"),
    Example(" q3", "p3", ("n", "")),
]
SUFFIXES = pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".jsonl.xz"])


@SUFFIXES
def test_round_trip(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    assert write_examples(path, iter(EXAMPLES)) == 3
    assert list(read_examples(path)) == EXAMPLES
    magic = {".gz": b"\x1f\x8b", ".xz": b"\xfd7zXZ"}.get(path.suffix, b"{")
    assert path.read_bytes().startswith(magic)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_examples(path, EXAMPLES)

    def broken():
        yield EXAMPLES[0]
        raise RuntimeError("source failed")

    with pytest.raises(RuntimeError, match="source failed"):
        write_examples(path, broken())
    assert list(read_examples(path)) == EXAMPLES
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"query": "q", "positive": "p", "id": 3, "rank": 0.5}, [Example("q", "p")]),
        ({"query": "q", "positive": "p", "score": 0.5}, [Example("q", "p", score=0.5)]),
        ({"sentence1": "q", "sentence2": "p", "label": 1}, [Example("q", "p", score=1.0)]),
        (
            {"query": "q", "positive": "p", "negatives": ["n"], "scores": [3, -1.5]},
            [Example("q", "p", ("n",), scores=(3.0, -1.5))],
        ),
        (
            {"query": "q", "positive": "p", "query_embedding": [1, 0], "positive_embedding": [0, 1]},
            [Example("q", "p", query_embedding=(1.0, 0.0), positive_embedding=(0.0, 1.0))],
        ),
        (
            {"query": "q", "positive": ["a", "b"], "negatives": ["n"]},
            [Example("q", "a", ("n",)), Example("q", "b", ("n",))],
        ),
        ({"query": "q", "positive": "p", "negatives": None, "instruction": None}, [Example("q", "p")]),
        ({"query": "q", "positive": "p", "negative": "n"}, [Example("q", "p", ("n",))]),
        ({"query": "q", "positive": "p", "negative": ["n", "m"]}, [Example("q", "p", ("n", "m"))]),
        ({"anchor": "q", "positive": "p"}, [Example("q", "p")]),
        ({"anchor": "q", "positive": "p", "negative": "n"}, [Example("q", "p", ("n",))]),
        (
            {"anchor": "q", "positive": "p", "negative_10": "c", "negative_2": "b", "negative_1": "a"},
            [Example("q", "p", ("a", "b", "c"))],
        ),
    ],
)
def test_columns(tmp_path, row, expected):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert list(read_examples(tmp_path / "rows.jsonl")) == expected
    write_examples(tmp_path / "again.jsonl", expected)
    assert list(read_examples(tmp_path / "again.jsonl")) == expected


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"score": "high"}, "column 'score' must hold finite numbers, got 'high'"),
        ({"score": True}, "'score' must hold finite numbers, got True"),
        ({"scores": 1.0}, "'scores' must be a list of numbers, got a number"),
        ({"scores": [1.0]}, "'scores' must hold 2 numbers, one for the positive and each negative, got 1"),
        ({"query_embedding": [1.0, float("nan")]}, "NaN is not a number in JSON"),
        ({"positive": ["a", "b"], "query_embedding": [1.0]}, "must be one text beside a teacher's vectors"),
    ],
)
def test_a_bad_number_is_named(tmp_path, column, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "q", "positive": "p", "negative": "n", **column}))
    with pytest.raises(DataError, match=f"rows.jsonl:1:.* {re.escape(message)}"):
        list(read_examples(tmp_path / "rows.jsonl"))


GOOD = b'{"query": "q", "positive": "p"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"rows\.jsonl: holds no examples"),
        (b"\n  \n", "holds no examples"),
        (GOOD + b'{"query": "q", "positive" "p"}\n', r"rows\.jsonl:2:27: not JSON"),
        (GOOD + GOOD[:20], r"rows\.jsonl:2:16: not JSON"),
        (GOOD + b'{"query": "q", "positive": "\xff"}', r"rows\.jsonl:2:29: not UTF-8"),
        (b"[1]", r"rows\.jsonl:1:1: expected an object .* got a list"),
        (b"[" * 100_000, r"rows\.jsonl:1:1: nested deeper than 100"),
        (GOOD + b'\n{"query": "q"}', r"rows\.jsonl:3: column 'positive' is missing; the row has \['query'\]"),
        (b'{"positive": "p"}', "column 'query' is missing"),
        (b'{"query": 3, "positive": "p"}', "column 'query' must be text, got a number"),
        (b'{"query": "q", "positive": null}', "column 'positive' must be text, got null"),
        (b'{"query": "q", "positive": []}', "column 'positive' is an empty list"),
        (b'{"query": "q", "positive": ["p", 1]}', "column 'positive' must hold texts, got a number at index 1"),
        (b'{"query": "q", "positive": "p", "negatives": {}}', "column 'negatives' must be text or a list of texts"),
        (b'{"query": "q", "positive": "p", "negative_3": 3}', "column 'negative_3' must be text or a list"),
        (b'{"query": "q", "positive": "p", "instruction": []}', "column 'instruction' must be text, got a list"),
        (b'{"query": "q", "positive": "p", "task": true}', "column 'task' must be text, got true or false"),
        (b'{"query": "q", "positive": "\\ud800x"}', r"rows\.jsonl:1:29: .*surrogate"),
    ],
)
def test_wrong_jsonl_is_named_to_the_place(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        list(read_examples(path))
    assert str(path) in str(error.value)
    assert error.value.exit_code == 3


def test_a_byte_order_mark_and_escaped_pairs_are_fine(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"query": "\\ud83d\\ude00", "positive": "\\u00e9"}\r\n')
    assert list(read_examples(path)) == [Example("\U0001f600", "\u00e9")]


@pytest.mark.parametrize("module", [gzip, lzma])
def test_damaged_compression(tmp_path, module):
    path = tmp_path / f"rows.jsonl.{'gz' if module is gzip else 'xz'}"
    whole = module.compress("".join(f'{{"query": "q{i}", "positive": "{i * 7919}"}}\n' for i in range(999)).encode())
    for content in (whole[:-20], whole[: len(whole) // 2], b"plain text", whole[:50] + b"\x00" * 50 + whole[100:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=re.escape(str(path))):
            list(read_examples(path))


def test_paths_that_are_no_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(read_examples(tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match=r"needs qrels/train\.tsv .* found none"):
        list(read_examples(tmp_path))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_lines(tmp_path))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [{"query": "q", "positive": "p", "negatives": ["n"], "task": "t"}, {"query": "r", "positive": "s"}]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert list(read_examples(path)) == [Example("q", "p", ("n",), None, "t"), Example("r", "s")]
    whole = path.read_bytes()
    parquet.write_table(pyarrow.table({"query": ["q", "q"], "positive": ["p", None]}), path)
    with pytest.raises(DataError, match=r"rows\.parquet:2: column 'positive' must be text, got null"):
        list(read_examples(path))
    parquet.write_table(pyarrow.table({"query": pyarrow.array([], "string")}), path)
    with pytest.raises(DataError, match="holds no examples"):
        list(read_examples(path))
    for content in (whole[:-10], b"not parquet", b"", whole[:4] + b"\xff" * (len(whole) - 12) + whole[-8:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"rows\.parquet: not a readable Parquet file"):
            list(read_examples(path))


@pytest.fixture
def beir(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text(
        '{"_id": "d1", "title": "T", "text": "one"}\n{"_id": "d2", "title": "", "text": "two"}\n'
    )
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "first"}\n')
    (tmp_path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq1\td2\t2\n")
    return tmp_path


def test_beir(beir):
    expected = [Example("first", "T one"), Example("first", "two")]
    assert list(read_examples(beir)) == expected
    (beir / "qrels" / "test.tsv").write_text("never read")
    assert list(read_examples(beir)) == expected
    (beir / "corpus.jsonl.gz").write_bytes(gzip.compress((beir / "corpus.jsonl").read_bytes()))
    (beir / "corpus.jsonl").unlink()
    assert list(read_examples(beir)) == expected


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        (
            "query-id\tcorpus-id\tscore\nq9\td1\t1\n",
            r"train\.tsv:2: query 'q9' is not in queries; no judgment above 0 is left",
        ),
        (
            "query-id\tcorpus-id\tscore\nq1\td9\t1\n",
            r"train\.tsv:2: document 'd9' is not in corpus; no judgment above 0 is left",
        ),
        ("q1 d1 1\n\nq1 d1 1", r"train\.tsv:3:1: expected query-id"),
        ("query-id\tcorpus-id\tscore\nq1\td1\thigh\n", r"train\.tsv:2:1: expected query-id"),
        ("query-id\tcorpus-id\tscore\nq1\td1\t0\n", "no judgment above 0"),
    ],
)
def test_wrong_judgements(beir, qrels, message):
    (beir / "qrels" / "train.tsv").write_text(qrels)
    with pytest.raises(DataError, match=message):
        list(read_examples(beir))


def test_wrong_beir_folders(beir):
    (beir / "queries.jsonl").write_text('{"text": "first"}\n')
    with pytest.raises(DataError, match=r"queries\.jsonl:1: '_id' must be text or an integer, got None"):
        list(read_examples(beir))
    (beir / "corpus.jsonl").unlink()
    with pytest.raises(DataError, match=r"needs corpus\.jsonl"):
        list(read_examples(beir))
    (beir / "qrels" / "train.tsv").rename(beir / "qrels" / "a.tsv")
    (beir / "qrels" / "b.tsv").touch()
    with pytest.raises(DataError, match=r"found a\.tsv, b\.tsv"):
        list(read_examples(beir))
