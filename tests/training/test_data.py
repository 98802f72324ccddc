"""Training on data as people have it: tables in memory, several by name, and their place in a resumed run."""

import json
import subprocess
import sys

import pytest

import pyqemb
from pyqemb.data.example import Example, write_examples
from pyqemb.errors import ConfigError, DataError
from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training.config import DataSet, TrainConfig, load_config, stage1, stage2, with_data
from pyqemb.training.datasets import read_datasets

datasets, pd, pl = map(pytest.importorskip, ("datasets", "pandas", "polars"))
ROWS = [{"query": f"q {i}", "positive": f"p {i}"} for i in range(6)]
SETTINGS = {"train": {"global_batch_size": 3, "memory": "none", "device": "cpu"}}


def read(data, **sections):
    return read_datasets(stage2(model={"base": "m"}, data=data, **sections))


def test_what_data_may_be(tmp_path):
    write_examples(tmp_path / "rows.jsonl", [Example(**row) for row in ROWS])
    path, frame = tmp_path / "rows.jsonl", pd.DataFrame(ROWS)
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))
    for data, names in (
        (path, ["rows"]),
        (str(path), ["rows"]),
        ([path], ["rows"]),
        ([path, frame], ["rows", "data"]),
        ([{"path": path, "weight": 2}], ["rows"]),
        (DataSet(path=str(path)), ["rows"]),
        (ROWS, ["data"]),
        (frame, ["data"]),
        (both, ["data"]),
        ({"a": path, "b": ROWS, "c": both, "d": pl.DataFrame(ROWS), "e": {"rows": ROWS, "weight": 1}}, list("abcde")),
        ([{"rows": frame, "name": "f", "instruction": "Find"}], ["f"]),
    ):
        found = read(data)
        assert list(found.examples) == names
        assert {tuple((e.query, e.positive) for e in rows) for rows in found.examples.values()} == {
            tuple((row["query"], row["positive"]) for row in ROWS)
        }
    assert read([{"rows": frame, "instruction": "Find"}]).instructions == {"Find"}
    assert read({"a": {"rows": ROWS, "weight": 2, "max_epochs": 3}}).weights == {"a": 2.0}


def test_columns_and_split_in_a_file(tmp_path):
    (tmp_path / "faq").mkdir()
    (tmp_path / "faq" / "test.csv").write_text("question,answer,id\nq,p,1\n")
    pd.DataFrame({"title": ["q"], "body": ["p"]}).to_parquet(tmp_path / "faq" / "train.parquet")
    (tmp_path / "run.toml").write_text(
        f'[model]\nbase = "m"\n[[data]]\npath = "{tmp_path}/faq"\nsplit = "test"\ncolumns = {{ ignore = ["id"] }}\n'
        f'[[data]]\npath = "{tmp_path}/faq"\nname = "b"\ncolumns = {{ query = "title", positive = "body" }}\n'
    )
    config = load_config(tmp_path / "run.toml")
    assert [list(rows) for rows in read_datasets(config).examples.values()] == [[Example("q", "p")]] * 2
    assert TrainConfig(**config.model_dump(mode="json")) == config
    other = config.model_dump(mode="json")
    other["data"][1]["columns"] = {"query": "body", "positive": "title"}
    assert next(iter(read_datasets(TrainConfig(**other)).examples["b"])) == Example("p", "q")  # not from the cache


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data: "),
        ({}, "data: "),
        ([{"name": "a", "rows": ROWS, "path": "b"}], r"data\.0: path and rows exclude each other"),
        ([{"path": "a", "columns": {"qurey": "b"}}], r"data\.0\.columns: 'qurey' is not a column of pyqemb"),
        ([{"path": "a", "wieght": 1}], "wieght: unknown key; did you mean 'weight'"),
        ({"a": {"rows": ROWS, "weight": 0}}, r"data\.0\.weight"),
    ],
)
def test_wrong_data_settings(data, message):
    with pytest.raises(ConfigError, match=message):
        stage1(model={"base": "m"}, data=data)
    with pytest.raises(ConfigError, match=message):
        with_data(stage1(model={"base": "m"}), data)


def test_data_are_given_once():
    with pytest.raises(ConfigError, match=r"data: missing; expected \[\[data\]\]"):
        pyqemb.train(stage2(model={"base": "m"}))
    with pytest.raises(ConfigError, match="give one of them"):
        pyqemb.train(stage2(model={"base": "m"}, data=ROWS), data=ROWS)
    with pytest.raises(DataError, match=r"faq\[1\]: column 'positive' is missing; the row has \['query'\]"):
        read({"faq": [ROWS[0], {"query": "q"}]})
    with pytest.raises(ConfigError, match="two datasets are called 'data'; give one of them another name"):
        read([pd.DataFrame(ROWS), pl.DataFrame(ROWS)])


def test_a_run_on_data_in_memory_resumes_on_the_same_data_alone(tmp_path):
    base = write_tiny_folder(tmp_path / "base", prefix=True, num_hidden_layers=1)
    config = stage1(model={"base": str(base)}, save={"dir": str(tmp_path / "run"), "every": 1}, **SETTINGS)

    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pyqemb.train(config, data={"faq": pd.DataFrame(ROWS)}, on_step=stop)
    changed = [*ROWS[:5], {"query": "q 5", "positive": "another"}]
    with pytest.raises(ConfigError, match="the training data are not those of the checkpoint"):
        pyqemb.train(config, data={"faq": pd.DataFrame(changed)}, resume="auto")
    result = pyqemb.train(config, data={"faq": datasets.Dataset.from_list(ROWS)}, resume="auto")
    assert result.steps == 2


SCRIPT = """
import json, sys
import torch, pandas, datasets, pyqemb
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank, folder = torch.distributed.get_rank(), sys.argv[1]
rows = [{"query": f"q {i}", "positive": f"p {i}"} for i in range(6)]
config = lambda name: pyqemb.stage1(
    model={"base": f"{folder}/base"}, save={"dir": f"{folder}/{name}"},
    train={"global_batch_size": 3, "memory": "none", "device": "cpu"},
)
data = [pandas.DataFrame(rows), datasets.Dataset.from_list(rows)][rank]
steps = pyqemb.train(config("same"), data={"faq": data}, evaluate={"dev": rows}).steps
try:
    pyqemb.train(config("other"), data={"faq": rows if rank else rows[::-1]})
    error = None
except Exception as caught:
    error = f"{type(caught).__name__}: {caught}"
with open(f"{folder}/rank{rank}.json", "w") as file:
    json.dump([steps, error], file)
"""


@pytest.mark.slow
def test_ranks_agree_by_what_the_data_hold(tmp_path):
    write_tiny_folder(tmp_path / "base", prefix=True, num_hidden_layers=1)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "script.py")]
    done = subprocess.run([sys.executable, *command, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        steps, error = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert steps == 2
        assert error.startswith("ConfigError: ")
        assert "rank 1 has the digest of the data = " in error
