"""The optimiser around a narrow model: what bfloat16 would lose is kept in float32."""

import sys

import pytest
import torch
from torch import nn

from pyqemb import ops
from pyqemb.data.batch import PackedBatch
from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.testing.tiny import tiny_embedder
from pyqemb.training.config import TrainConfig, TrainSection
from pyqemb.training.grad_cache import GradCache
from pyqemb.training.groups import checkpoint_bytes, moment_bytes, part_of, rate_scales
from pyqemb.training.optim import Optimizer
from pyqemb.training.preflight import pending_moments


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
    second.load({n: w.detach().clone() for n, w in first.weights.items()}, first.state_tensors(), "here")
    for optimizer, layer in ((first, one), (second, other)):
        run(optimizer, layer, 3)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(first.weights["weight"], second.weights["weight"])
    assert first.state_tensors().keys() == second.state_tensors().keys()


def muon_in_float64(weight, gradients, rate, momentum, weight_decay):
    """Jordan et al. 2024, with the updates scaled to those of AdamW: Liu et al. 2025, arXiv 2502.16982."""
    weight, buffer = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in gradients:
        buffer = momentum * buffer + (1 - momentum) * gradient.double()
        x = momentum * buffer + (1 - momentum) * gradient.double()  # Nesterov
        transposed = x.shape[0] > x.shape[1]
        x = x.T if transposed else x
        x = x / x.norm()
        for _ in range(5):  # the quintic iteration that moves all singular values to about 1
            square = x @ x.T
            x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
        x = x.T if transposed else x
        weight = weight - rate * weight_decay * weight - 0.2 * max(weight.shape) ** 0.5 * rate * x
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_steps_the_matrices_of_the_layers_and_adamw_the_others(dtype):
    """torch iterates in bfloat16, so float64 is met to its precision; the weights are those of torch's class."""
    section = TrainSection(optimizer="muon", weight_decay=0.1, muon_momentum=0.9)
    model, adamw = tiny_embedder(), tiny_embedder()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    muon, others = Optimizer(model, section, dtype), Optimizer(adamw, TrainSection(weight_decay=0.1), dtype)
    generator = torch.Generator().manual_seed(0)
    gradients = [{name: torch.randn(w.shape, generator=generator) for name, w in start.items()} for _ in range(3)]
    for step in gradients:
        for optimizer in (muon, others):
            for name, weight in optimizer.weights.items():
                weight.grad = step[name].clone()
            optimizer.step(1e-2)
    inner = {name for name, w in start.items() if w.ndim == 2 and ".layers." in name}
    assert len(inner) == 14
    for name, weight in muon.weights.items():
        if name not in inner:
            assert torch.equal(weight, others.weights[name]), name
            continue
        plain = torch.nn.Parameter(start[name].clone())
        reference = torch.optim.Muon(
            [plain], lr=1e-2, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        )  # fmt: skip
        for step in gradients:
            plain.grad = step[name].clone()
            reference.step()
        assert torch.equal(weight.detach(), plain.detach()), name
        truth = muon_in_float64(start[name], [step[name] for step in gradients], 1e-2, 0.9, 0.1)
        moved = (truth - start[name]).norm()
        assert (weight.detach() - truth).norm() < 0.02 * moved, name
    kinds = {key.rpartition("/")[2] for key in muon.state_tensors() if key.rpartition("/")[0] in inner}
    assert kinds == {"momentum_buffer"}
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), muon.weights[name].detach().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_of_muon_goes_out_and_in(dtype):
    def run(optimizer, steps, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            for weight in optimizer.weights.values():
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step(1e-2)

    section = TrainSection(optimizer="muon")
    first, second = Optimizer(tiny_embedder(), section, dtype), Optimizer(tiny_embedder(seed=1), section, dtype)
    run(first, 3, 0)
    second.load({n: w.detach().clone() for n, w in first.weights.items()}, first.state_tensors(), "here")
    for optimizer in (first, second):
        run(optimizer, 2, 1)
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


def test_the_bytes_of_the_state_are_those_that_are_planned():
    for section in (TrainSection(), TrainSection(optimizer="muon"), TrainSection(optimizer="muon", ema_decay=0.9)):
        model = tiny_embedder()
        optimizer = Optimizer(model, section)
        parameters = dict(model.named_parameters())
        assert pending_moments(optimizer) == sum(
            moment_bytes(name, p, section) * p.numel() for name, p in parameters.items()
        )
        for weight in optimizer.weights.values():
            weight.grad = torch.ones_like(weight)
        optimizer.step(1e-3)
        held = sum(value.nbytes for value in optimizer.state_tensors().values() if value.ndim)
        assert checkpoint_bytes(model, section) == held + sum(w.nbytes for w in optimizer.weights.values())
        assert pending_moments(optimizer) == 0


def test_muon_needs_whole_matrices():
    sections = {"model": {"base": "b"}, "data": [{"path": "d"}], "train": {"optimizer": "muon"}}
    for shard in (2, -1):
        with pytest.raises(ConfigError, match=r"^train\.optimizer: muon .* parallel\.shard .* got 'muon'$"):
            TrainConfig(**sections, parallel={"shard": shard})
    assert TrainConfig(**sections, parallel={"replicate": 2})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lion_steps_as_float64_does(dtype):
    """Chen et al. 2023, arXiv 2302.06675, algorithm 2."""
    pytest.importorskip("lion_pytorch")
    section = TrainSection(optimizer="lion", weight_decay=0.1, layer_decay=0.5)
    assert section.betas == (0.9, 0.99)
    assert TrainSection(optimizer="lion", betas=(0.95, 0.98)).betas == (0.95, 0.98)
    model = tiny_embedder()
    start = {name: p.detach().double() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, section, dtype)
    generator = torch.Generator().manual_seed(0)
    gradients = [{name: torch.randn(w.shape, generator=generator) for name, w in start.items()} for _ in range(3)]
    for step in gradients:
        for name, weight in optimizer.weights.items():
            weight.grad = step[name].clone()
        optimizer.step(1e-3)
    scales = rate_scales(start, section)
    for name, truth in start.items():
        rate, decay, momentum = 1e-3 * scales[part_of(name)], 0.1 if truth.ndim > 1 else 0.0, 0.0
        for step in gradients:
            gradient = step[name].double()
            update = torch.sign(0.9 * momentum + 0.1 * gradient)
            truth = truth - rate * (update + decay * truth)
            momentum = 0.99 * momentum + 0.01 * gradient
        torch.testing.assert_close(optimizer.weights[name].detach().double(), truth, rtol=2e-6, atol=2e-7)
    other = Optimizer(tiny_embedder(seed=1), section, dtype)
    other.load({n: w.detach().clone() for n, w in optimizer.weights.items()}, optimizer.state_tensors(), "here")
    for each in (optimizer, other):
        for name, weight in each.weights.items():
            weight.grad = gradients[0][name].clone()
        each.step(1e-3)
    assert all(torch.equal(optimizer.weights[name], other.weights[name]) for name in start)
    held = sum(value.nbytes for value in optimizer.state_tensors().values())
    assert checkpoint_bytes(tiny_embedder(), section) == held + sum(4 * w.numel() for w in start.values())


def of(optimizer, **changes):
    state = {**optimizer.state_tensors(), **{key.replace("__", "/"): value for key, value in changes.items()}}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"other__exp_avg": torch.zeros(3, 4)}, r"'other/exp_avg' should have the shape none, found \(3, 4\)"),
        ({"weight__momentum_buffer": torch.zeros(3, 4)}, "'weight/momentum_buffer' should have the shape none"),
        ({"weight__exp_avg": torch.zeros(4, 3)}, r"'weight/exp_avg' should have the shape \(3, 4\), found \(4, 3\)"),
        ({"weight__exp_avg_sq": None}, r"'weight/exp_avg_sq' should have the shape \(3, 4\), found none"),
        ({"weight__step": torch.zeros(1)}, r"'weight/step' should have the shape \(\), found \(1,\)"),
        ({"weight__ema": None}, "'weight/ema' should have the shape"),
        ({"scale__value": None}, "'scale/value' should have the shape"),
        ({"weight__exp_avg": torch.zeros(3, 4, dtype=torch.int8)}, "'weight/exp_avg' is stored as torch.int8"),
        ({"weight__step": torch.zeros((), dtype=torch.int64)}, "'weight/step' is stored as torch.int64"),
    ],
)
def test_a_damaged_state_is_refused(changes, words):
    layer, scale = linear(), nn.Parameter(torch.zeros(()))
    optimizer = Optimizer(layer, TrainSection(ema_decay=0.9), extra_parameters={"scale": scale})
    (layer(torch.ones(1, 4)).sum() * scale).backward()
    optimizer.step(1e-3)
    with pytest.raises(CheckpointError, match=f"^step_3: damaged: the optimizer's {words}"):
        optimizer.load(optimizer.weights, of(optimizer, **changes), "step_3")
    optimizer.load(optimizer.weights, of(optimizer), "step_3")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    with pytest.raises(ConfigError, match=r"train\.optimizer: lion needs the extra lion: pip install 'pyqemb\[lion\]'"):
        Optimizer(tiny_embedder(), TrainSection(optimizer="lion"))
