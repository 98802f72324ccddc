"""Columns that an objective does not use: told or refused before the first step, naming row and column."""

import json
import os

import pyarrow as pa
import pyarrow.parquet
import pytest

from pyqemb.data.example import Example, write_examples
from pyqemb.data.shards import write_shards
from pyqemb.errors import DataError
from pyqemb.training import stage2
from pyqemb.training.datasets import read_datasets


def read(path, **options):
    return read_datasets(stage2(model={"base": "m"}, data=[{"path": str(path), **options.pop("data", {})}], **options))


def pairs(folder, *scores, task=None):
    write_examples(
        folder / "pairs.jsonl", [Example(f"q{i}", "p", score=score, task=task) for i, score in enumerate(scores)]
    )
    return folder / "pairs.jsonl"


def test_a_label_of_0_is_refused(tmp_path, caplog):
    for value in (0, -1.0):
        path = pairs(tmp_path, 1.0, value)
        with pytest.raises(
            DataError, match=rf"pairs\.jsonl:2: column 'score' \(or 'label'\) is {value:g}, but info_nce treats"
        ):
            read(path)
    with pytest.raises(DataError, match="but rerank treats every pair"):
        read(path, task="rerank")
    write_shards(tmp_path / "shards", [Example("q", "p"), Example("q", "p", score=0.0, task="t")])
    with pytest.raises(DataError, match=r"row 1 of task 't': column .*set loss\.tasks\.t = \"cosent\""):
        read(tmp_path / "shards")
    read(pairs(tmp_path, 1.0, 1.0, None))
    assert not caplog.records


def test_graded_scores_are_told(tmp_path, caplog):
    read(pairs(tmp_path, 1.0, 0.5, 0.25))
    assert "columns that info_nce does not use: 'score' (2 rows, first " in caplog.text
    assert "pairs.jsonl:2" in caplog.text
    assert 'give the rows task = "sts"' in caplog.text
    caplog.clear()
    read(pairs(tmp_path, 0.0, 0.5, task="sts"))
    assert not caplog.records


def test_teachers_and_negatives_that_are_not_used(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    write_examples(path, [Example("q", "p", ("n",), scores=(2.0, 1.0), query_embedding=(1.0,))])
    read(path)
    assert "info_nce does not use: 'scores' (1 rows" in caplog.text
    assert "'query_embedding' (1 rows" in caplog.text
    write_examples(path, [Example("q", "p", ("n",), score=0.0, task="sts")])
    caplog.clear()
    read(path)
    assert "cosent does not use: 'negatives' (1 rows" in caplog.text


def test_a_folder_of_parquet_is_only_read(tmp_path, caplog):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 3), ("test", 2)):
        rows = [{"query": f"{split}{i}", "positive": "p", "url": "u"} for i in range(count)]
        pa.parquet.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    before = sorted(os.listdir(folder))
    folder.chmod(0o500)
    for _ in range(2):
        (examples,) = read(folder).examples.values()
        assert [example.query for example in examples] == ["train0", "train1", "train2"]
        (examples,) = read(folder, data={"split": "test"}).examples.values()
        assert [example.query for example in examples] == ["test0", "test1"]
    assert sorted(os.listdir(folder)) == before
    assert len(list((tmp_path.__class__(os.environ["XDG_CACHE_HOME"]) / "pyqemb" / "shards").iterdir())) == 2
    folder.chmod(0o700)


def test_label_by_the_command_line(tmp_path, capsys):
    from pyqemb.cli import main
    from pyqemb.testing.tiny import write_tiny_folder

    write_tiny_folder(tmp_path / "base")
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in (1, 0)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.toml").write_text(
        f'[model]\nbase = "{tmp_path}/base"\n[[data]]\npath = "{tmp_path}/rows.jsonl"\n[save]\ndir = "{tmp_path}/run"\n'
    )
    assert main(["train", str(tmp_path / "run.toml")]) == 3
    assert "rows.jsonl:2: column 'score' (or 'label') is 0" in capsys.readouterr().err
    assert not (tmp_path / "run" / "final").exists()
