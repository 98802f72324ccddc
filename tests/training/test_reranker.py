"""Rerankers: trained by yes and no, alone and by several processes, merged, measured, used from the command line."""

import gzip
import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pyqemb
from pyqemb import Reranker
from pyqemb.cli import main
from pyqemb.data.example import Example
from pyqemb.data.loader import build_pairs
from pyqemb.data.pairs import INSTRUCTION, format_pair
from pyqemb.errors import ConfigError, DataError
from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import stage2
from pyqemb.training.datasets import read_datasets
from pyqemb.training.objectives import objective_class

WORDS = ["sun", "sea", "tree", "bird", "stone", "cloud"]


@pytest.fixture
def workplace(tmp_path):
    """Pairs whose positive repeats the query's word, in a language that a tiny model can learn."""
    write_tiny_folder(tmp_path / "base", max_position_embeddings=1024, prefix=True)
    draw = random.Random(0)
    for name, count in (("train", 120), ("dev", 30)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                right, *wrong = draw.sample(WORDS, 3)
                file.write(json.dumps({"query": right, "positive": right, "negatives": wrong}) + "\n")
    return tmp_path


def config(folder, name="run", **train):
    settings = {
        "steps": 60,
        "global_batch_size": 12,
        "learning_rate": 1e-2,
        "tokens_per_chunk": 3000,
        "warmup": 5,
        **train,
    }
    return stage2(
        task="rerank", model={"base": str(folder / "base"), "max_length": 400},
        data=[{"path": str(folder / "train.jsonl"), "instruction": "Same"}],
        train=settings, save={"dir": str(folder / name)},
        eval={"data": str(folder / "dev.jsonl"), "metric": "accuracy"},
    )  # fmt: skip


def test_the_batch_is_pairs():
    examples = [Example("q", "p", ("a", "b")), Example("q", "p", ("a",), "Told")]
    batch = build_pairs(examples, "Find")
    assert [batch.texts[i] for i in batch.document_text] == [
        *(format_pair("q", text, "Find") for text in ("p", "a", "b")),
        *(format_pair("q", text, "Told") for text in ("p", "a")),
    ]
    assert batch.positive.tolist() == [0, 3]
    assert batch.owner.tolist() == [0, 0, 0, 1, 1]
    assert batch.candidates.tolist() == [[0, 1, 2], [3, 4, -1]]


def test_the_loss_is_that_of_the_label_tokens(workplace):
    """-log p(label) over two tokens, and over processes the parts add up."""
    batch = build_pairs([Example("q", "p", ("a", "b")), Example("r", "p", ("a",))], INSTRUCTION)
    logits = torch.randn(5, 2, dtype=torch.float64)
    loss = config(workplace).loss
    wanted = -torch.stack([logits.log_softmax(1)[i, 0 if i in (0, 3) else 1] for i in range(5)]).mean()
    objective = objective_class("rerank")(loss)
    whole = objective.loss(batch, None, logits, slice(0, 2)).loss
    parts = [objective.loss(batch, None, logits, rows).loss for rows in (slice(0, 1), slice(1, 2), slice(2, 2))]
    assert torch.allclose(whole, wanted)
    assert torch.allclose(sum(parts), wanted)


def test_learns_and_is_measured(workplace):
    path = workplace / "run.json"
    path.write_text(config(workplace, steps=300, learning_rate=2e-3).model_dump_json())
    before = pyqemb.evaluate(
        Reranker.from_pretrained(workplace / "base", device="cpu", max_length=400),
        workplace / "dev.jsonl",
        instruction="Same",
        bootstrap=0,
    )
    assert main(["train", str(path)]) == 0
    trained = Reranker.from_pretrained(workplace / "run" / "best", device="cpu")
    assert trained.default_instruction == "Same"
    after = pyqemb.evaluate(trained, workplace / "dev.jsonl", bootstrap=10)
    assert after["task"] == "reranking"
    assert after["count"] == 30
    assert after["metrics"]["accuracy@1"]["value"] > 0.9 > before["metrics"]["accuracy@1"]["value"]
    rows = [json.loads(line) for line in (workplace / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-2]["loss"] < 0.3 < rows[0]["loss"]
    assert main(["evaluate", str(workplace / "run" / "best"), str(workplace / "dev.jsonl")]) == 0


def test_chunks_and_plans_change_nothing(workplace):
    for name, train in {"one": {"tokens_per_chunk": 100_000}, "many": {"tokens_per_chunk": 700}}.items():
        pyqemb.train(config(workplace, name, steps=3, **train))
    one, many = (load_file(workplace / name / "final" / "model.safetensors") for name in ("one", "many"))
    assert all((one[name] - many[name]).abs().max() < 1e-4 for name in one)


def test_merging(workplace):
    for seed in (0, 1):
        pyqemb.train(config(workplace, f"run{seed}", steps=20, seed=seed))
    finals = [workplace / f"run{seed}" / "final" for seed in (0, 1)]
    pyqemb.merge(finals, out=workplace / "merged")
    merged = Reranker.from_pretrained(workplace / "merged", device="cpu")
    pairs = [("sun", "sun"), ("sun", "sea")]
    lone = [Reranker.from_pretrained(folder, device="cpu").margins(pairs) for folder in finals]
    assert np.isfinite(merged.margins(pairs)).all()
    assert merged.default_instruction == "Same"
    assert not np.allclose(merged.margins(pairs), lone[0])
    from pyqemb.testing.tiny import tiny_embedder

    tiny_embedder(max_position_embeddings=1024).save_pretrained(workplace / "embedder")
    with pytest.raises(ConfigError, match="cannot merge reranker, embedder with each other"):
        pyqemb.merge([finals[0], workplace / "embedder"], out=workplace / "no")


def test_command_line(workplace, capsys):
    model = Reranker.from_pretrained(workplace / "base", device="cpu")
    folder = model.save_pretrained(workplace / "model")
    pairs = workplace / "pairs.jsonl"
    rows = [
        {"query": "sun", "document": "sea", "id": 7},
        {"query": "sun", "documents": ["sea", "tree", "sun"], "instruction": "Told"},
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = workplace / "out.jsonl"
    assert main(["rerank", str(folder), str(pairs), "--out", str(out)]) == 0
    one, three = map(json.loads, out.read_text().splitlines())
    assert one == {**rows[0], "score": pytest.approx(float(model.score([("sun", "sea")])[0]), abs=1e-6)}
    scores = model.score([("sun", text) for text in rows[1]["documents"]], instruction="Told")
    assert three["scores"] == pytest.approx(scores.tolist(), abs=1e-6)
    assert three["documents"] == rows[1]["documents"]
    assert main(["rerank", str(folder), str(pairs), "--out", str(out), "--top-k", "2"]) == 0
    two = json.loads(out.read_text().splitlines()[1])
    assert two["documents"] == [rows[1]["documents"][i] for i in np.argsort(-scores)[:2]]
    pairs.write_text('{"query": "x"}\n')
    assert main(["rerank", str(folder), str(pairs), "--out", str(out)]) == 3
    assert "pairs.jsonl:1: expected a query with a document or documents" in capsys.readouterr().err
    assert json.loads(out.read_text().splitlines()[1]) == two
    assert main(["rerank", str(folder), str(pairs), "--out", str(workplace / "rr.csv")]) == 2
    assert "rr.csv: expected a name that ends with .jsonl" in capsys.readouterr().err
    (workplace / "pairs.csv").write_text("query,document\nsun,sea\n")
    assert main(["rerank", str(folder), str(workplace / "pairs.csv"), "--out", str(workplace / "o.jsonl.gz")]) == 0
    with gzip.open(workplace / "o.jsonl.gz") as file:
        assert json.loads(file.read())["score"] == one["score"]
    assert main(["train", str(_written(workplace)), "--dry-run"]) == 0
    assert "yes or no" in (shown := capsys.readouterr().out)
    assert "<Instruct>: Same" in shown


def _written(workplace):
    path = workplace / "dry.json"
    path.write_text(config(workplace).model_dump_json())
    return path


def test_what_is_refused(workplace):
    for change, message in (
        ({"loss": {"matryoshka": [16]}}, "task 'rerank' has no loss.matryoshka"),
        ({"train": {"documents": "ring"}}, "task 'rerank' has no train.documents"),
        ({"task": "ranking"}, "task: "),
    ):
        with pytest.raises(ConfigError, match=message):
            stage2(**{"task": "rerank", "model": {"base": "x"}, "data": [{"path": "y"}], **change})
    (workplace / "train.jsonl").write_text('{"query": "a", "positive": "b"}\n')
    with pytest.raises(DataError, match="no example has negatives: every answer would be yes"):
        read_datasets(config(workplace))
    with pytest.raises(DataError, match="no example has negatives to tell the positive from"):
        pyqemb.evaluate(Reranker.from_pretrained(workplace / "base", device="cpu"), workplace / "train.jsonl")
