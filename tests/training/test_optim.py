"""The optimiser around a narrow model: what bfloat16 would lose is kept in float32."""

import pytest
import torch
from torch import nn

from pyqemb import ops
from pyqemb.data.batch import PackedBatch
from pyqemb.testing.tiny import tiny_embedder
from pyqemb.training.config import TrainSection
from pyqemb.training.grad_cache import GradCache
from pyqemb.training.optim import Optimizer


def batch(count, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return PackedBatch.pack([torch.randint(0, 380, (n,), generator=generator).tolist() for n in lengths])


def loss_fn(queries, documents):
    return ops.info_nce(queries, documents, torch.arange(len(queries)), temperature=0.1)


def linear(value=1.0):
    layer = nn.Linear(4, 3, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def test_updates_below_a_bfloat16_step_are_kept():
    """Steps of 1e-4 on a weight of 1, where bfloat16 has nothing between 1 and 0.996."""
    plain = linear().bfloat16()
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-4, weight_decay=0.0)
    layer = linear()
    optimizer = Optimizer(layer, TrainSection(weight_decay=0.0), torch.bfloat16)
    for _ in range(100):
        plain.weight.grad = torch.ones_like(plain.weight)
        adamw.step()
        optimizer.zero_grad()
        layer(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step(1e-4)
    assert torch.equal(plain.weight, torch.ones_like(plain.weight)), "plain AdamW on bfloat16 moves nothing"
    assert layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(optimizer.weights["weight"], torch.full((3, 4), 0.99), atol=1e-5, rtol=0)
    assert torch.equal(layer.weight.detach(), optimizer.weights["weight"].bfloat16())


def test_gradients_add_up_in_float32():
    """256 + 1 is 256 in bfloat16."""
    layer = linear()
    optimizer = Optimizer(layer, TrainSection(max_grad_norm=None), torch.bfloat16)
    for _ in range(1000):
        layer(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(optimizer.weights["weight"].grad, torch.full((3, 4), 1000.0))
    assert optimizer.clip() == pytest.approx(1000 * 12**0.5)
    optimizer.zero_grad()
    assert optimizer.clip() == 0


@pytest.mark.parametrize("tokens", [1, 60])
def test_gradients_of_chunks_are_those_of_one_pass(tokens):
    """Chunking adds no more error than bfloat16 arithmetic has anyway."""
    queries, documents = batch(7, 0), batch(12, 1)
    rounded = tiny_embedder().bfloat16().float()

    def gradients(dtype, budget):
        model = tiny_embedder()
        model.load_state_dict(rounded.state_dict())
        optimizer = Optimizer(model, TrainSection(), dtype)
        GradCache(model, loss_fn, budget).step(queries, documents)
        return torch.cat([weight.grad.flatten() for weight in optimizer.weights.values()])

    truth = gradients(torch.float32, 10**6)
    whole, chunked = ((gradients(torch.bfloat16, n) - truth).norm() / truth.norm() for n in (10**6, tokens))
    assert 0 < chunked < 1.5 * whole < 0.1


def test_the_model_is_rounded_from_its_own_float32_weights():
    model = tiny_embedder()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, TrainSection(), torch.bfloat16)
    assert all(torch.equal(weight, before[name]) for name, weight in optimizer.weights.items())
    assert all(torch.equal(p, before[name].bfloat16()) for name, p in model.named_parameters())
    wide = Optimizer(tiny_embedder(), TrainSection())
    assert all(wide.weights[name] is p for name, p in wide.model.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_out_and_in(dtype):
    def run(optimizer, layer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            layer(torch.arange(4.0, dtype=dtype)[None]).square().sum().backward()
            optimizer.step(1e-3)

    one = linear(0.3)
    first = Optimizer(one, TrainSection(), dtype)
    run(first, one, 3)
    other = linear(0.7)
    second = Optimizer(other, TrainSection(), dtype)
    second.load({n: w.detach().clone() for n, w in first.weights.items()}, first.state_tensors())
    for optimizer, layer in ((first, one), (second, other)):
        run(optimizer, layer, 3)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(first.weights["weight"], second.weights["weight"])
    assert first.state_tensors().keys() == second.state_tensors().keys()
