"""Rows of one query as an example with several positives: from the data to the loss."""

import json

import pytest
import torch
from torch.nn.functional import normalize

import pyqemb
from pyqemb.data.example import Example
from pyqemb.data.grouping import group_by_query
from pyqemb.errors import ConfigError, DataError
from pyqemb.ops.groups import PRESETS
from pyqemb.testing import reference
from pyqemb.testing.tiny import tiny_embedder, write_tiny_folder
from pyqemb.training import stage2
from pyqemb.training.config import LossSection
from pyqemb.training.objectives import objective_class

ROWS = [
    Example("how to print", "choose print", ("choose save", "press a key")),
    Example("how to save", "choose save"),
    Example("how to print", "press control p", ("press a key", "choose undo")),
    Example("how to undo", "choose undo", ("choose cut",)),
    Example("how to print", "choose print"),
    Example("how to print", "with an instruction", instruction="Find it"),
    Example("how to save", "press control s", ("choose print",)),
]


def test_rows_of_a_query_are_one_example():
    first, second, third, fourth = group_by_query("x", ROWS)
    assert (first.positive, first.more_positives) == ("choose print", ("press control p",))
    assert first.negatives == ("choose save", "press a key", "choose undo")
    assert (second.positive, second.more_positives) == ("choose save", ("press control s",))
    assert third == ROWS[3]
    assert fourth == ROWS[5]


@pytest.mark.parametrize("loss", [{}, {"softmax": "split"}, {"preset": "gte", "tau_plus": 0.01}, {"matryoshka": (8,)}])
def test_the_loss_is_the_mean_over_the_positives_of_each_query(loss):
    examples = group_by_query("x", ROWS)
    objective = objective_class("info_nce")(LossSection(temperature=0.1, **loss))
    batch = objective.build_batch(examples, tiny_embedder())
    generator = torch.Generator().manual_seed(0)
    leaves = [
        normalize(torch.randn(len(x), 16, dtype=torch.float64, generator=generator), dim=1).requires_grad_()
        for x in (batch.query_text, batch.document_text)
    ]
    at = {batch.texts[text]: place for place, text in enumerate(batch.document_text.tolist())}
    positives = [[at[each] for each in (e.positive, *getattr(e, "more_positives", ()))] for e in examples]
    assert [len(each) for each in positives] == [2, 2, 1, 1]
    cut = [normalize(x[:, :8], dim=1) for x in leaves] if "matryoshka" in loss else leaves
    truth = reference.several_positives(
        *cut, positives, batch.owner,
        temperature=0.1, groups=PRESETS[loss.get("preset", "qwen3")], split="softmax" in loss,
        tau_plus=loss.get("tau_plus", 0.0),
    )  # fmt: skip
    parts = [objective.loss(batch, *leaves, rows).loss for rows in (slice(0, 1), slice(1, 4), slice(4, 4))]
    torch.testing.assert_close(sum(parts), truth, rtol=1e-10, atol=0)
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (sum(parts), truth)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_chunks_of_any_size_train_the_same(tmp_path):
    base = str(write_tiny_folder(tmp_path / "base"))
    rows = [{"query": e.query, "positive": e.positive, "negatives": list(e.negatives)} for e in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses, norms = {}, {}
    for grouped, tokens in ((True, 20), (True, 10_000), (False, 10_000)):
        config = stage2(
            model={"base": base}, data=[{"path": str(tmp_path / "rows.jsonl"), "group_positives": grouped}],
            save={"dir": str(tmp_path / f"{grouped}_{tokens}")},
            train={
                "steps": 2, "global_batch_size": 3, "device": "cpu", "learning_rate": 1e-3, "tokens_per_chunk": tokens,
            },
        )  # fmt: skip
        result = pyqemb.train(config)
        losses[grouped, tokens] = [row["loss"] for row in result.metrics]
        norms[grouped, tokens] = [row["grad_norm"] for row in result.metrics]
    assert losses[True, 20] == pytest.approx(losses[True, 10_000], rel=1e-4)
    assert norms[True, 20] == pytest.approx(norms[True, 10_000], rel=1e-4)
    assert losses[True, 20] != pytest.approx(losses[False, 10_000], rel=1e-2)


@pytest.mark.parametrize(
    ("entry", "loss", "train", "error", "message"),
    [
        ({}, {}, {"documents": "ring"}, ConfigError, "train.documents: a ring takes one positive a query.* got 'ring'"),
        (
            {},
            {"objective": "cosent"},
            {},
            ConfigError,
            "group_positives: dataset 'x' is trained by cosent, which takes",
        ),
        (
            {"rows": [Example("q", "p", score=1.0)]},
            {},
            {},
            DataError,
            "dataset 'x': example 1 has score, which belongs",
        ),
    ],
)
def test_what_cannot_be_grouped(tmp_path, entry, loss, train, error, message):
    base = str(write_tiny_folder(tmp_path / "base"))
    data = {"rows": ROWS, "name": "x", "group_positives": True, **entry}
    with pytest.raises(error, match=message):
        pyqemb.train(stage2(model={"base": base}, loss=loss, train={"steps": 1, "device": "cpu", **train}, data=[data]))


def test_shards_cannot_be_grouped(tmp_path):
    pandas = pytest.importorskip("pandas")
    folder = tmp_path / "data"
    folder.mkdir()
    pandas.DataFrame([{"query": "q", "positive": f"p{i}"} for i in range(3)]).to_parquet(folder / "train.parquet")
    base = str(write_tiny_folder(tmp_path / "base"))
    data = [{"path": str(folder), "group_positives": True}]
    with pytest.raises(ConfigError, match="group_positives: dataset 'data' is read from shards or Parquet"):
        pyqemb.train(stage2(model={"base": base}, train={"steps": 1, "device": "cpu"}, data=data))
