"""A guide: its vectors decide which candidates are false negatives."""

import json

import pytest
import torch

import pyqemb
from pyqemb import ops
from pyqemb.cli import main
from pyqemb.data.example import Example
from pyqemb.errors import ConfigError
from pyqemb.model.embedder import Embedder
from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import stage2

ROWS = [
    {"query": f"how do I {verb}?", "positive": f"choose {verb} in the menu", "negatives": [f"do not {verb}"]}
    for verb in ("print", "save", "undo", "cut", "copy", "paste")
]


@pytest.fixture
def folders(tmp_path):
    """A model of 32 features, and a guide of 48."""
    write_tiny_folder(tmp_path / "base")
    write_tiny_folder(tmp_path / "guide", seed=7, hidden_size=48)
    return tmp_path


def config(folders, run, guide=None, loss=None, data=None, **train):
    defaults = {"steps": 2, "global_batch_size": 6, "num_negatives": 1, "learning_rate": 1e-3, "device": "cpu"}
    return stage2(
        model={"base": str(folders / "base")}, guide={"model": str(folders / "guide"), **(guide or {})},
        train={**defaults, **train}, data=[data or {"rows": ROWS}], loss=loss or {},
        save={"dir": str(folders / run), "every": 2},
    )  # fmt: skip


def test_the_loss_is_that_of_the_op(folders, monkeypatch):
    """Of the first step, by the vectors of both models."""
    settings = dict(guide={"margin": -0.02, "relative": True}, loss={"margin": None, "temperature": 0.1})
    result = pyqemb.train(config(folders, "run", **settings, learning_rate=1e-12)).metrics[0]
    queries = [row["query"] for row in ROWS]
    documents = [text for row in ROWS for text in (row["positive"], *row["negatives"])]
    vectors = {}
    for name in ("run/final", "guide"):
        model = Embedder.from_pretrained(folders / name)
        vectors[name] = [torch.from_numpy(x) for x in (model.encode_query(queries), model.encode_document(documents))]
    options = dict(
        owner=torch.arange(12) // 2, temperature=0.1, margin=None, guide_margin=-0.02, guide_relative=True,
        return_stats=True,
    )  # fmt: skip
    loss, stats = ops.info_nce(*vectors["run/final"], torch.arange(6) * 2, guide=vectors["guide"], **options)
    assert result["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert result["masked"] == pytest.approx(stats["masked"], abs=1e-9)
    assert 0 < stats["masked"] < 1
    assert ops.info_nce(*vectors["run/final"], torch.arange(6) * 2, **options)[1]["masked"] == 0


def test_chunks_of_any_size_train_the_same_and_share_the_vectors(folders):
    rows = {}
    for tokens in (20, 10_000):
        settings = config(folders, f"run{tokens}", {"cache": str(folders / "cache")}, tokens_per_chunk=tokens)
        rows[tokens] = pyqemb.train(settings).metrics
    for key in ("loss", "grad_norm", "masked"):
        assert [row[key] for row in rows[20]] == pytest.approx([row[key] for row in rows[10_000]], rel=1e-4)
    assert (folders / "cache").is_dir()
    assert not (folders / "run20" / "guide").exists()


def test_other_objectives_ignore_it(folders):
    """Of a run with both; classification compares with wrong labels, which need no guide."""
    rows = [Example(row["query"], row["positive"], tuple(row["negatives"]), task="classification") for row in ROWS]
    data = {"rows": [*rows, *(Example(e.query, e.positive, e.negatives) for e in rows)], "name": "x"}
    metrics = pyqemb.train(config(folders, "both", {"margin": -9.0}, data=data, steps=4)).metrics
    masked = {row["dataset"]: row["masked"] for row in metrics}
    assert len(masked) == 2
    assert set(masked.values()) == {0.0, 1.0}


def test_what_is_refused(folders, capsys):
    with pytest.raises(
        ConfigError, match=r"train.documents: a guide's mask needs the vectors of all ranks.* got 'ring'"
    ):
        config(folders, "x", documents="ring")
    with pytest.raises(ConfigError, match="task 'rerank' has no guide"):
        stage2(task="rerank", model={"base": "x"}, data=[{"path": "x"}], guide={"model": "x"})
    scored = {"rows": [{"sentence1": "a", "sentence2": "b", "score": 1.0}] * 2, "name": "x"}
    with pytest.raises(
        ConfigError, match="guide: no dataset is trained by info_nce, which uses it; they are by cosent"
    ):
        pyqemb.train(config(folders, "x", loss={"objective": "cosent"}, data=scored))
    assert not (folders / "x" / "final").exists()


def test_a_dry_run_names_the_guide(folders, capsys):
    (folders / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folders / "run.json").write_text(json.dumps({
        "model": {"base": str(folders / "base")}, "data": [{"path": str(folders / "pairs.jsonl")}],
        "guide": {"model": str(folders / "guide"), "margin": -0.1}, "save": {"dir": str(folders / "dry")},
    }))  # fmt: skip
    assert main(["train", str(folders / "run.json"), "--dry-run"]) == 0
    assert f"guide      {folders / 'guide'}, margin -0.1" in capsys.readouterr().out
