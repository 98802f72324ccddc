"""Columns of other trainers, what is left out, and what is no layout."""

import json

import pytest

from pyqemb.data.example import Example, read_examples
from pyqemb.errors import DataError


def read(folder, *rows, **options):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_examples(folder / "rows.jsonl", **options))


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"query": "q", "pos": ["a", "b"], "neg": ["n"]}, [Example("q", "a", ("n",)), Example("q", "b", ("n",))]),
        (
            {
                "query": "q",
                "pos": ["a", "b"],
                "neg": ["n"],
                "pos_scores": [3, 2],
                "neg_scores": [0.5],
                "prompt": "Find",
            },
            [
                Example("q", "a", ("n",), "Find", scores=(3.0, 0.5)),
                Example("q", "b", ("n",), "Find", scores=(2.0, 0.5)),
            ],
        ),
        ({"query": "q", "pos": ["a"], "neg": [], "pos_scores": None, "neg_scores": []}, [Example("q", "a")]),
        (
            {
                "messages": [user("q")],
                "positive_messages": [[user("a")], [user("b")]],
                "negative_messages": [[{"role": "assistant", "content": "n"}]],
            },
            [Example("q", "a", ("n",)), Example("q", "b", ("n",))],
        ),
        (
            {"messages": [user("q")], "positive_messages": [[user("a")]], "label": 0.8},
            [Example("q", "a", score=0.8)],
        ),
        (
            {"messages": [{"role": "system", "content": "Find"}, user("q"), {"role": "assistant", "content": "a"}]},
            [Example("q", "a", instruction="Find")],
        ),
        ({"query": "q", "response": "a", "rejected_response": ["n", "m"]}, [Example("q", "a", ("n", "m"))]),
        ({"query": "q", "response": "a", "rejected_response": "n"}, [Example("q", "a", ("n",))]),
        ({"question": "q", "answer": "a"}, [Example("q", "a")]),
        ({"query": "q", "answer": "a"}, [Example("q", "a")]),
    ],
)
def test_layouts(tmp_path, row, expected, caplog):
    assert read(tmp_path, row) == expected
    assert not caplog.records


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"premise": "a", "hypothesis": "b"},
            "'query' is missing; .*accepted are .*sentence1.*FlagEmbedding.*ms-swift",
        ),
        ({"query": "q", "passage": "b"}, "'positive' is missing; .*accepted are"),
        ({"query": " \n", "positive": "p"}, "column 'query' is empty"),
        ({"query": "q", "positive": ""}, "column 'positive' is empty"),
        ({"query": "q", "pos": ["p", "\u2003"]}, "column 'pos' is empty at index 1"),
        ({"query": "\u200b\ufeff", "positive": "p"}, "column 'query' is empty"),
        ({"query": "q", "positive": "\u00ad"}, "column 'positive' is empty"),
        ({"query": "q", "pos": ["p", "\u2060"]}, "column 'pos' is empty at index 1"),
        ({"messages": [user("\u200b")], "positive_messages": [[user("a")]]}, "empty message"),
        (
            {"Query": "q", "Positive": "p"},
            "the row has .*; rename 'Query' to 'query', rename 'Positive' to 'positive'; acc",
        ),
        ({"query": "q", " POSITIVE": "p"}, "column 'positive' is missing; .*; rename ' POSITIVE' to 'positive'"),
        ({"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1]}, "'neg_scores' must hold 1 numbers"),
        ({"messages": "q", "positive_messages": [[user("a")]]}, "'messages' must hold messages like"),
        ({"messages": [user("q"), user("r")], "positive_messages": [[user("a")]]}, "must hold one message of the user"),
        ({"messages": [user(" ")], "positive_messages": [[user("a")]]}, "empty message"),
        ({"messages": [user("q")], "positive_messages": [[user("a"), user("b")]]}, "lists of one message"),
        ({"messages": [user("q")], "positive_messages": ["a"]}, "'positive_messages' must hold messages"),
        ({"messages": [user("q")]}, "column 'positive' is missing"),
    ],
)
def test_what_is_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=f"rows.jsonl:2: .*{message}"):
        read(tmp_path, {"query": "q", "positive": "p"}, row)


def test_other_columns_are_counted_once(tmp_path, caplog):
    rows = [{"query": "q", "positive": "p", "id": i, "url": None if i else "u"} for i in range(3)]
    assert len(read(tmp_path, *rows)) == 3
    (record,) = caplog.records
    assert record.getMessage().endswith(
        f"'id' (3 rows, first {tmp_path}/rows.jsonl:1), 'url' (1 rows, first {tmp_path}/rows.jsonl:1)"
    )


def test_cells_are_text_or_numbers(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('sentence1,sentence2,score\n"a, b",c,0.5\nd,e,\n')
    assert list(read_examples(path)) == [Example("a, b", "c", score=0.5), Example("d", "e")]
    path.write_text("anchor,positive,negative_1,negative_2\na,b,[1],\n")
    assert list(read_examples(path)) == [Example("a", "b", ("[1]",))]
    for content, message in (
        ("query,positive,score\na,b,high\n", "rows.csv:2: column 'score' must hold finite numbers, got 'high'"),
        ("query,positive,score\na,b,inf\n", "must hold finite numbers, got inf"),
        ("query,positive,negatives\na,b,\"['x']\"\n", "'negatives' is a list, which a cell cannot hold"),
        ("query,positive\n,b\n", "rows.csv:2: column 'query' is empty"),
        ("query;positive\na;b\n", "rows.csv:2: column 'query' is missing; the row has \\['query;positive'\\]"),
        ("query;positive\na;b\n", "; ';' seems to be the delimiter: save the file with commas"),
        ("query\tpositive\na\tb\n", r"; '\\t' seems to be the delimiter"),
        ("query,positive,score\na,b,1_0\n", "must hold finite numbers, got '1_0'"),
        ("query,positive,score\na,b,\u0661\n", "must hold finite numbers, got"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            list(read_examples(path))


def test_curation_may_read_empty_texts(tmp_path):
    assert read(tmp_path, {"query": "", "positive": " "}, allow_empty=True) == [Example("", " ")]
