import json

import pytest

from pyqemb.cli import main
from pyqemb.testing.tiny import write_tiny_folder


@pytest.fixture
def workplace(tmp_path):
    write_tiny_folder(tmp_path / "base")
    rows = [{"query": f"q {i}", "positive": f"d {i}"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "dev").mkdir()
    pairs = [{"sentence1": f"q {i}", "sentence2": f"d {i}"} for i in range(5)]
    (tmp_path / "dev" / "bitext.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "run.toml").write_text(f"""
stage = 1
[model]
base = "{tmp_path / "base"}"
[[data]]
path = "{tmp_path / "pairs.jsonl"}"
instruction = "Find it"
[train]
steps = 4
batch_size = 8
[eval]
data = "{tmp_path / "dev"}"
[save]
dir = "{tmp_path / "run"}"
""")
    return tmp_path


def test_trains_and_measures(workplace, capsys):
    assert main(["train", str(workplace / "run.toml"), "--set", "train.lr=1e-3"]) == 0
    out = capsys.readouterr().out
    assert str(workplace / "run" / "final") in out
    assert str(workplace / "run" / "best") in out
    rows = [json.loads(line) for line in (workplace / "run" / "metrics.jsonl").open()]
    assert "accuracy" in rows[-1]["eval"]
    prompts = json.loads((workplace / "run" / "final" / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts["query"] == "Instruct: Find it\nQuery:"


def test_dry_run_shows_the_plan_and_writes_nothing(workplace, capsys):
    assert main(["train", str(workplace / "run.toml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "setting    stage = 1"
    for line in ("train.learning_rate = 2e-05", f'data[0].path = "{workplace / "pairs.jsonl"}"', "train.steps = 4"):
        assert f"\nsetting    {line}\n" in out
    assert "{" not in out
    assert "20 rows" in out
    assert "negatives  up to 7 documents a query" in out
    assert main(["train", str(workplace / "run.toml"), "--dry-run", "--set", "train.memory=1GB"]) == 0
    assert "chunks of up to" in (out := capsys.readouterr().out)
    assert "predicted peak" in out
    assert main(["train", str(workplace / "run.toml"), "--dry-run", "--set", "parallel.shard=2"]) == 0
    assert "--world RANKS --gpu-memory SIZE plans theirs" in capsys.readouterr().out
    assert main(["train", str(workplace / "run.toml"), "--dry-run", "--set", "lora={}"]) == 0
    assert "\nsetting    lora = {}\n" in capsys.readouterr().out
    assert main(["train", str(workplace / "run.toml"), "--dry-run", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["config"]["train"]["learning_rate"] == 2e-05
    assert printed["config"]["train"]["schedule"] == "cosine"
    assert any(line.startswith("dataset    pairs: 20 rows") for line in printed["plan"])
    assert not (workplace / "run").exists()


@pytest.mark.parametrize(
    ("file", "content", "code", "message"),
    [
        ("run.toml", "stage = 1\n[modle]\n", 2, "did you mean 'model'"),
        ("run.toml", "stage = ", 2, "run.toml"),
        ("pairs.jsonl", '{"query": "a", "positive": "b"}\n{"query": "a"\n', 3, "pairs.jsonl:2:"),
        ("pairs.jsonl", "", 3, "pairs.jsonl"),
        ("pairs.jsonl", '{"query": 1, "positive": "b"}\n', 3, "pairs.jsonl:1: column 'query'"),
        ("base/model.safetensors", "cut", 3, "model.safetensors"),
        ("dev/bitext.jsonl", "[]", 3, "bitext.jsonl:1"),
    ],
)
def test_bad_input_names_the_place(workplace, capsys, file, content, code, message):
    (workplace / file).write_text(content)
    assert main(["train", str(workplace / "run.toml")]) == code
    assert message in capsys.readouterr().err
    assert not (workplace / "run" / "final").exists()


def test_missing_model(workplace, capsys):
    assert main(["train", str(workplace / "run.toml"), "--set", f"model.base={workplace / 'none'}"]) in (2, 3)
    assert "none" in capsys.readouterr().err
