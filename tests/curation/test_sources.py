"""Mining and curation of data as people have it: tables, columns of other names, on the command line too."""

import json

import numpy as np
import pytest

import pyqemb
from pyqemb.cli import main
from pyqemb.data.example import Example, read_examples
from pyqemb.errors import ConfigError, DataError
from pyqemb.testing.tiny import write_tiny_folder

datasets, pd = map(pytest.importorskip, ("datasets", "pandas"))
ROWS = [{"title": f"query {i}", "body": f"positive {i}", "id": i} for i in range(6)]
COLUMNS = {"query": "title", "positive": "body", "ignore": ["id"]}
NAMED = ["--column", "query=title", "--column", "positive=body", "--column", "ignore=id"]


class Encoder:
    def encode_query(self, texts, instruction=None, dim=None):
        draws = (np.random.default_rng(list(text.encode())).standard_normal(16) for text in texts)
        return np.stack([vector / np.linalg.norm(vector) for vector in draws]).astype(np.float32)

    def encode_document(self, texts, dim=None):
        return self.encode_query(texts)


def test_mine_takes_tables():
    options = {"columns": COLUMNS, "k": 2, "max_positive_ratio": None}
    mined = [pyqemb.mine(Encoder(), rows, **options) for rows in (ROWS, pd.DataFrame(ROWS))]
    assert mined[0].examples == mined[1].examples
    assert all(len(example.negatives) == 2 for example in mined[0].examples)
    with pytest.raises(DataError, match="column 'query' is missing"):
        pyqemb.mine(Encoder(), ROWS)


def test_curate_takes_tables_beside_files(tmp_path):
    pd.DataFrame(ROWS[:3]).to_csv(tmp_path / "rows.csv", index=False)
    both = [tmp_path / "rows.csv", datasets.Dataset.from_list([*ROWS[3:], {**ROWS[0], "body": ""}])]
    steps = [{"kind": "length", "min_positive": 1}]
    for given in (both, pd.DataFrame(ROWS), ROWS):
        done = pyqemb.curate({"input": given, "out": tmp_path / "out", "columns": COLUMNS, "step": steps})
        assert done.kept == 6
        assert list(read_examples(tmp_path / "out" / "kept.jsonl"))[5] == Example("query 5", "positive 5")
    done = pyqemb.curate({"input": both, "out": tmp_path / "out", "columns": COLUMNS, "step": steps})
    assert (done.seen, done.kept) == (7, 6)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["input"] == [str(tmp_path / "rows.csv"), "Dataset"]


def test_columns_on_the_command_line(tmp_path, capsys):
    base = write_tiny_folder(tmp_path / "base", prefix=True, num_hidden_layers=1)
    pd.DataFrame(ROWS).to_csv(tmp_path / "rows.csv", index=False)
    rows, out = str(tmp_path / "rows.csv"), str(tmp_path / "mined.jsonl")
    assert main(["mine", str(base), rows, "--out", out, "--max-score", "2", *NAMED]) == 0
    assert [example.query for example in read_examples(out)] == [row["title"] for row in ROWS]
    assert main(["evaluate", str(base), rows, "--bootstrap", "0", *NAMED]) == 0
    assert "ndcg@10" in capsys.readouterr().out
    assert main(["mine", str(base), rows, "--out", out]) == 3
    assert 'columns = {query = "title", positive = "body", ignore = ["id"]}' in capsys.readouterr().err
    assert main(["mine", str(base), rows, "--out", out, "--column", "query"]) == 2
    assert "--column: expected NAME=COLUMN" in capsys.readouterr().err


def test_wrong_columns_cost_nothing(tmp_path):
    with pytest.raises(ConfigError, match="'qurey' is not a column of pyqemb"):
        pyqemb.curate({"input": ROWS, "out": tmp_path, "columns": {"qurey": "title"}, "step": [{"kind": "length"}]})
    assert not list(tmp_path.iterdir())
