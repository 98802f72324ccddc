"""Which files of a folder are read."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from pyqemb.data.example import read_examples
from pyqemb.errors import DataError


def make(folder, *names):
    """Each file has one row, whose query is its name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"query": name, "positive": "p"}
        if name.endswith(".parquet"):
            pa.parquet.write_table(pa.Table.from_pylist([row]), path)
        elif name.endswith(".csv"):
            path.write_text(f"query,positive\n{name},p\n")
        else:
            content = json.dumps(row).encode()
            path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


def read(folder, split=None):
    return [example.query for example in read_examples(folder, split)]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (["train.jsonl"], ["test.jsonl"]),
        (["train.csv"], ["eval.csv"]),
        (
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
            ["data/test-00000-of-00001.parquet"],
        ),
        (["default/train/0000.parquet"], ["default/test/0000.parquet"]),
        (["data/train/a.jsonl.gz", "data/train/b.jsonl.gz"], ["data/test/a.jsonl.gz"]),
        (["my_train_file.json"], ["my file evaluation 2.json"]),
        (["training-1.jsonl"], ["Testing-1.jsonl"]),
        (["trainset.jsonl"], ["testset.jsonl"]),
        (["trainData.json"], ["testData.json"]),
        (["train_set.csv"], ["evalset.csv"]),
        (["TRAINSET.jsonl"], ["TestFile.jsonl"]),
        (["squadTrain.jsonl"], ["squadTest.jsonl"]),
        (["trainPairs.jsonl"], ["testPairs.jsonl"]),
        (["trainingdata/a.jsonl", "trainingdata/b.jsonl"], ["testingdata/a.jsonl"]),
    ],
)
def test_conventions(tmp_path, train, test):
    make(tmp_path, *train, *test, "README.md", ".cache/train.jsonl")
    (tmp_path / "LICENSE").touch()
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".gitattributes").touch()
    assert read(tmp_path) == read(tmp_path, "train") == train
    assert read(tmp_path, "test") == test
    with pytest.raises(DataError, match="no split 'dev'; splits found: test, train"):
        read(tmp_path, "dev")


def test_other_names_of_splits(tmp_path):
    make(tmp_path, "data/train-00000-of-00001.parquet", "data/hard-00000-of-00001.parquet", "data/dev.parquet")
    assert read(tmp_path, "hard") == ["data/hard-00000-of-00001.parquet"]
    assert read(tmp_path, "validation") == read(tmp_path, "dev") == ["data/dev.parquet"]


def test_without_splits_all_is_train(tmp_path):
    make(tmp_path, "a.jsonl", "b.jsonl")
    assert read(tmp_path) == read(tmp_path, "train") == ["a.jsonl", "b.jsonl"]
    with pytest.raises(DataError, match="no split 'test'"):
        read(tmp_path, "test")


@pytest.mark.parametrize(
    "name",
    ["latest", "contest", "trains", "pretrained", "testament", "devices", "values", "evaluate", "HumanEval", "DevOps"],
)
def test_words_that_tell_no_split(tmp_path, name):
    make(tmp_path, f"{name}.jsonl", "other.jsonl")
    assert sorted(read(tmp_path)) == sorted([f"{name}.jsonl", "other.jsonl"])


def test_a_wrong_default_says_how_to_choose(tmp_path):
    with pytest.raises(
        DataError, match=r"no split 'train'; splits found: test, validation; choose one: split = 'test' in \[\[data\]\]"
    ):
        read(make(tmp_path, "testset.jsonl", "devset.jsonl"))


def test_the_only_split_is_said(tmp_path, caplog):
    make(tmp_path, "test.jsonl")
    assert read(tmp_path) == ["test.jsonl"]
    assert "reading split 'test', the only one there" in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["test.jsonl", "dev.jsonl"], "no split 'train'; splits found: test, validation"),
        (["train.jsonl", "more.jsonl"], r"more\.jsonl: its name has no split, but other files have one \(train\)"),
        (["train/test.jsonl"], "is it test or train"),
        (["a.jsonl", "b.csv"], r"files of several formats \(\.csv, \.jsonl\)"),
        (["a.jsonl", "a.jsonl.gz"], "exists plain and compressed"),
        (["pair/train.jsonl", "triplet/train.jsonl"], "several configurations \\('pair', 'triplet'\\)"),
        (["a.jsonl", "notes.txt"], r"notes\.txt: unknown file"),
        (["train/data-00000-of-00001.arrow"], r"\.arrow: unknown file"),
    ],
)
def test_what_is_refused(tmp_path, names, message):
    with pytest.raises(DataError, match=message):
        read(make(tmp_path, *names))


def test_a_file_has_no_splits(tmp_path):
    with pytest.raises(DataError, match="has no splits to choose from; got split 'test'"):
        read(make(tmp_path, "a.jsonl") / "a.jsonl", "test")
