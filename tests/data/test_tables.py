"""Rows in memory, saved datasets and the columns setting, with the real packages."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pyqemb.data.example import Example, read_examples, write_examples
from pyqemb.errors import ConfigError, DataError

datasets, pd, pl = map(pytest.importorskip, ("datasets", "pandas", "polars"))
ROWS = [
    {"query": "q0", "positive": "p0", "negatives": ["n0", "m0"], "score": 0.5},
    {"query": "q1", "positive": "p1", "negatives": [], "score": None},
    {"query": "q2", "positive": "p2", "negatives": None, "score": 1.0},
]
EXAMPLES = [Example("q0", "p0", ("n0", "m0"), score=0.5), Example("q1", "p1"), Example("q2", "p2", score=1.0)]


def transformed():
    plain = datasets.Dataset.from_list([{"a": i} for i in range(3)])
    return plain.with_transform(lambda batch: {key: [ROWS[i][key] for i in batch["a"]] for key in ROWS[0]})


TABLES = {
    "dicts": lambda: ROWS,
    "tuples and arrays": lambda: (
        [{**row, "negatives": tuple(row["negatives"] or ())} for row in ROWS[:1]]
        + [{**ROWS[1], "negatives": np.array([], dtype=object)}, {**ROWS[2], "score": np.float32(1)}]
    ),
    "examples": lambda: EXAMPLES,
    "generator": lambda: iter(ROWS),
    "pandas": lambda: pd.DataFrame(ROWS, index=[7, 8, 9]),
    "polars": lambda: pl.DataFrame(ROWS),
    "arrow": lambda: pa.Table.from_pylist(ROWS),
    "Dataset": lambda: datasets.Dataset.from_list(ROWS),
    "Dataset, reordered": lambda: datasets.Dataset.from_list(ROWS[::-1]).select([2, 1, 0]),
    "Dataset, formatted": lambda: datasets.Dataset.from_list([{**row, "id": 1} for row in ROWS]).with_format(
        "numpy", columns=list(ROWS[0])
    ),
    "Dataset, transformed": transformed,
    "IterableDataset": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "DatasetDict": lambda: datasets.DatasetDict(
        test=datasets.Dataset.from_list(ROWS[:1]), train=datasets.Dataset.from_list(ROWS)
    ),
}


@pytest.mark.parametrize("kind", TABLES)
def test_every_kind_gives_the_same_examples(kind):
    assert list(read_examples(TABLES[kind]())) == EXAMPLES


def test_splits_of_a_datasetdict(caplog):
    both = TABLES["DatasetDict"]()
    assert list(read_examples(both, "test")) == EXAMPLES[:1]
    with pytest.raises(DataError, match="DatasetDict: no split 'dev'; splits found: test, train"):
        list(read_examples(both, "dev"))
    with pytest.raises(DataError, match="Dataset: has no splits to choose from; got split 'test'"):
        list(read_examples(both["train"], "test"))


def test_saved_datasets(tmp_path):
    TABLES["DatasetDict"]().save_to_disk(tmp_path / "both")
    TABLES["Dataset, reordered"]().save_to_disk(tmp_path / "one", num_shards=2)
    assert list(read_examples(tmp_path / "both")) == list(read_examples(tmp_path / "one")) == EXAMPLES
    assert list(read_examples(tmp_path / "both", "test")) == EXAMPLES[:1]
    (tmp_path / "one" / "data-00001-of-00002.arrow").write_bytes(b"")
    with pytest.raises(DataError, match="one: load_from_disk cannot read it"):
        list(read_examples(tmp_path / "one"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"query": "q", "positive": "p"}, {"query": " ", "positive": "p"}], r"list\[1\]: column 'query' is empty"),
        (
            pd.DataFrame({"query": ["q", None], "positive": "p"}),
            r"DataFrame\[1\]: column 'query' must be text, got null",
        ),
        (pd.DataFrame({"query": ["q", 1], "positive": "p"}), "DataFrame: Arrow.*query"),
        (pd.DataFrame({0: ["q"], 1: ["p"]}), "expected names of columns that are text, got 0"),
        (pl.DataFrame({"query": ["q"], "positive": ["p"]}).lazy(), "LazyFrame: is a LazyFrame; give its collect"),
        ([Example("q", "")], r"list\[0\]: column 'positive' is empty"),
        ([{1: "q", "positive": "p"}], r"list\[0\]: expected names of columns that are text, got 1"),
        ([("q", "p")], r"list\[0\]: expected a dict or an Example, got tuple"),
        ([], "list: holds no examples"),
        (pl.DataFrame({"query": [], "positive": []}), "DataFrame: holds no examples"),
        (7, "int: expected a Dataset or DatasetDict, a pandas or Polars DataFrame, .* or a path, got int"),
        ({"query": ["q"], "positive": ["p"]}, "a list of dicts or Examples, or a path, got dict"),
        (
            [{"query": "q", "positive": "p", "id": 1, "url": "u"}],
            r"list\[0\]: column 'id', 'url' is not understood; the row has \['id', .*accepted are .*sentence1.*; "
            r"name it, or leave it out: columns=\{\"ignore\": \[\"id\", \"url\"\]\}$",
        ),
        (
            [{"title": "a", "body": "b", "id": 1}],
            r"say which column it is, "
            r"for example columns=\{\"query\": \"title\", \"positive\": \"body\", \"ignore\": \[\"id\"\]\}; accepted",
        ),
        (
            [{"title": "a", "body": "b"}],
            r"list\[0\]: column 'query' is missing; the row has \['body', 'title'\]; say which column it is, "
            r"for example columns=\{\"query\": \"title\", \"positive\": \"body\"\}; accepted are",
        ),
    ],
)
def test_what_is_refused_in_memory(rows, message):
    with pytest.raises(DataError, match=message):
        list(read_examples(rows))


def test_columns_of_every_reader(tmp_path):
    rows = [{"question": "a", "answers": "b", "hard": "c", "harder": "d", "id": 1}]
    columns = {"positive": "answers", "negatives": ["hard", "harder"], "ignore": ["id"]}
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    pd.DataFrame(rows).to_csv(tmp_path / "rows.tsv", index=False, sep="\t")
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    pd.DataFrame(rows).to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    sources = [tmp_path / name for name in ("rows.csv", "rows.tsv", "rows.parquet", "rows.jsonl", "saved")]
    for source in (*sources, rows, pl.DataFrame(rows)):
        assert list(read_examples(source, columns=columns)) == [Example("a", "b", ("c", "d"))]
    with pytest.raises(DataError, match="column 'id' must be text, got a number"):
        list(read_examples(rows, columns={"query": "question", "positive": "id", "ignore": "answers"}))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"query": "question"},
            r"rows.jsonl:1: column 'id' is not understood; .*columns = \{query = \"question\", ignore = \[\"id\"\]\}",
        ),
        (
            {"query": "title", "ignore": "id"},
            "column 'question' exists beside .'title'., which `columns` reads as query",
        ),
        (
            {"query": "question", "negatives": "hard", "ignore": ["id", "gone"]},
            "columns names 'gone', 'hard', which no row has",
        ),
    ],
)
def test_columns_that_do_not_fit(tmp_path, columns, message):
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "positive": "p", "id": 1}\n')
    with pytest.raises(DataError, match=message):
        list(read_examples(tmp_path / "rows.jsonl", columns=columns))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"qurey": "a"}, "'qurey' is not a column of pyqemb; expected some of query, positive, negatives"),
        ({"query": ["a", "b"]}, "'query' must be one column"),
        ({"query": "a", "positive": "a"}, "'a' is named twice"),
        ({"query": ""}, "'query' must be the name of a column, got ''"),
    ],
)
def test_wrong_settings(columns, message):
    with pytest.raises(ConfigError, match=message):
        list(read_examples([{"a": "q", "positive": "p"}], columns=columns))


def test_shards_and_beir_have_columns_of_their_own(tmp_path):
    from pyqemb.data.shards import write_shards

    write_shards(tmp_path / "shards", EXAMPLES)
    with pytest.raises(DataError, match="columns is for rows"):
        list(read_examples(tmp_path / "shards", columns={"query": "question"}))


def test_no_library_is_imported_for_a_file(tmp_path):
    write_examples(tmp_path / "rows.jsonl", EXAMPLES)
    code = (
        "import sys, pyqemb; assert len(list(pyqemb.read_examples(sys.argv[1]))) == 3; "
        "assert len(list(pyqemb.read_examples([{'query': 'q', 'positive': 'p'}]))) == 1; "
        "assert not {'datasets', 'pandas', 'polars', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "rows.jsonl")], check=True)


def test_a_damaged_table_is_refused():
    """Arrow would read beyond the end of the text."""
    offsets, text = pa.py_buffer(np.array([0, 10**9, 6], dtype=np.int32)), pa.py_buffer(b"abcdef")
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, text])
    table = pa.table({"query": column, "positive": ["a", "b"]})
    with pytest.raises(DataError, match=r"^Table: is damaged: "):
        list(read_examples(table))


def test_values_that_python_cannot_hold_are_refused():
    damaged = pa.array([2**62], pa.timestamp("s", "Mars/Base"))
    with pytest.raises(DataError, match=r"^Table: cannot be read from row 0: "):
        list(read_examples(pa.table({"query": damaged, "positive": ["p"]})))


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["query", "query", "positive"])
    pq.write_table(table, tmp_path / "rows.parquet")
    for source, name in ((table, "Table"), (tmp_path / "rows.parquet", r"\S*rows\.parquet")):
        with pytest.raises(DataError, match=rf"^{name}: two columns have one name: \['query', 'query', 'positive'\]"):
            list(read_examples(source))
