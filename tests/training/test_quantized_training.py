"""Quantization-aware training and the spread-out regularizer."""

import pytest
import torch
from torch.nn.functional import normalize

import pyqemb
from pyqemb.errors import ConfigError
from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import stage2
from pyqemb.training.config import LossSection
from pyqemb.training.objectives.fake_quantize import fake_quantize
from pyqemb.training.objectives.spread_out import spread_out
from pyqemb.training.parallel.world import World

ALONE = World(0, 1, torch.device("cpu"))
ROWS = [
    {"query": f"how do I {verb}?", "positive": f"choose {verb} in the menu"}
    for verb in ["print", "save", "undo", "cut"]
]


def unit(*shape, dtype=torch.float64):
    return normalize(torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_int8_has_steps_of_the_largest_value():
    x = unit(50, 24)
    found = fake_quantize(x, "int8")
    codes = torch.round(x / x.abs().amax(dim=1, keepdim=True) * 127)
    assert torch.allclose(found, normalize(codes, dim=1), atol=1e-15)
    assert 0 < (found - x).abs().max() < 0.5 / 127
    assert len({round(v) for v in (codes[0]).tolist()}) > 10


def test_binary_has_the_signs():
    x = unit(50, 24)
    assert torch.allclose(fake_quantize(x, "binary"), torch.where(x > 0, 1.0, -1.0).double() / 24**0.5, atol=1e-15)


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_the_gradient_passes_straight_through(precision):
    x, weights = unit(9, 8).requires_grad_(), unit(9, 8)
    (fake_quantize(x, precision) * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_a_zero_vector_stays_finite():
    assert torch.isfinite(fake_quantize(torch.zeros(2, 4), "int8")).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_spread_out_is_the_mean_squared_cosine_of_pairs(dtype):
    x, counts = unit(7, 5, dtype=dtype), torch.tensor([1, 2, 0, 1, 1, 3, 1])
    repeated = x.double().repeat_interleave(counts, dim=0)
    pairs = (repeated @ repeated.T).square()
    n = len(repeated)
    truth = (pairs.sum() - pairs.diagonal().sum()) / (n * (n - 1))
    error = 1e-14 if dtype == torch.float64 else 1e-6
    assert spread_out(x, counts, n, ALONE).double().item() == pytest.approx(truth.item(), rel=error)


def test_gradients_of_spread_out_are_those_of_finite_differences():
    x, counts = (unit(6, 4) * 1.3).requires_grad_(), torch.tensor([1, 2, 0, 1, 1, 3])
    assert torch.autograd.gradcheck(lambda v: spread_out(v, counts, 8, ALONE), x)


def test_one_vector_and_no_vector_have_no_pairs():
    for rows in (0, 1):
        x = unit(rows, 4).requires_grad_()
        loss = spread_out(x, torch.ones(rows, dtype=torch.int64), rows, ALONE)
        assert loss.item() == 0
        loss.backward()
        assert not x.grad.any()


def test_the_loss_is_the_mean_over_the_precisions(tmp_path):
    """Losses of the first step: float32 and binary alone, both, and both with the regularizer."""
    base, losses = str(write_tiny_folder(tmp_path / "base")), {}
    for name, loss in {
        "float32": {}, "binary": {"precisions": ["binary"]}, "both": {"precisions": ["float32", "binary"]},
        "spread": {"precisions": ["float32", "binary"], "spread_out": 0.5},
    }.items():  # fmt: skip
        config = stage2(
            model={"base": base}, loss=loss, save={"dir": str(tmp_path / name)},
            train={"steps": 2, "global_batch_size": 4, "device": "cpu", "learning_rate": 1e-12},
        )  # fmt: skip
        losses[name] = pyqemb.train(config, data=ROWS).metrics[0]["loss"]
    assert abs(losses["float32"] - losses["binary"]) > 1e-3
    assert losses["both"] == pytest.approx((losses["float32"] + losses["binary"]) / 2, rel=1e-6)
    model = pyqemb.Embedder.from_pretrained(tmp_path / "float32" / "final")  # with the prompts of the run
    sides = model.encode_query([row["query"] for row in ROWS]), model.encode_document([row["positive"] for row in ROWS])
    expected = sum(
        ((x @ x.T) ** 2)[~torch.eye(4, dtype=torch.bool)].mean().item() for x in map(torch.from_numpy, sides)
    )
    assert losses["spread"] - losses["both"] == pytest.approx(0.5 * expected, rel=2e-3)


def test_what_is_refused():
    for bad in ([], ["binary", "binary"], ["int4"]):
        with pytest.raises(ValueError, match="precisions"):
            LossSection(precisions=bad)
    with pytest.raises(ValueError, match="spread_out"):
        LossSection(spread_out=-1)
    for loss in ({"precisions": ["binary"]}, {"spread_out": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(loss))):
            stage2(task="rerank", model={"base": "x"}, data=[{"path": "x"}], loss=loss)
