"""Bytes of a rank by kind against what FSDP2 holds, gathers and reduces in a process group that only pretends."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from pyqemb.data.batch import PackedBatch
from pyqemb.model.lora import LoraConfig, add_lora
from pyqemb.model.shard_files import sharded_like
from pyqemb.model.shards import local, own_rows
from pyqemb.testing.tiny import tiny_embedder
from pyqemb.training.config import TrainSection
from pyqemb.training.grad_cache.plan import Plan
from pyqemb.training.optim import Optimizer
from pyqemb.training.parallel.layout import choose_reshard, rank_memory, units_of


def model_of(lora, **sizes):
    model = tiny_embedder(num_hidden_layers=3, **sizes)
    if lora:
        model.requires_grad_(False)
        add_lora(model.model, LoraConfig(rank=4))
    return model


def nbytes(tensors):
    return sum(x.untyped_storage().nbytes() for x in tensors)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replica_holds_what_the_optimizer_of_today_holds(lora, dtype):
    model = model_of(lora)
    predicted = rank_memory(units_of(model), 1, dtype)
    optimizer = Optimizer(model, TrainSection(), dtype)
    model(PackedBatch.pack([[1, 2, 3]])).sum().backward()
    weights = {id(x): x for x in (*model.parameters(), *optimizer.weights.values())}
    assert predicted.weights == nbytes(weights.values())
    gradients = [x.grad for x in optimizer.grad_tensors]
    assert predicted.gradients == nbytes(gradients)
    assert predicted.largest == max(x.nbytes for x in gradients)
    optimizer.step(1e-3)
    moments = [value for name, value in optimizer.state_tensors().items() if value.ndim]
    assert predicted.moments == nbytes(moments)
    assert predicted.gathered == predicted.reduction == 0


def test_an_average_is_a_third_moment():
    model = model_of(True)
    predicted = rank_memory(units_of(model), 1, torch.bfloat16, average=True)
    plain = rank_memory(units_of(model), 1, torch.bfloat16)
    optimizer = Optimizer(model, TrainSection(ema_decay=0.9), torch.bfloat16)
    assert predicted.average == nbytes(optimizer.average.values()) == predicted.moments / 2
    assert predicted.standing == plain.standing + predicted.average


@pytest.fixture
def ranks_of(request):
    """A process group of so many ranks, of which only this one runs."""
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("ranks_of", [2, 5, 64], indirect=True)
def test_shards_are_those_of_fsdp(ranks_of, lora):
    model = model_of(lora, hidden_size=48)
    predicted = rank_memory(units_of(model), ranks_of, torch.float32)
    whole = rank_memory(units_of(model), 1, torch.float32)
    mesh = init_device_mesh("cpu", (ranks_of,))
    for part in (model.model.embed_tokens, *model.model.layers, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=False)
    shards = [x.to_local() for x in model.parameters()]
    assert predicted.weights == sum(x.nbytes for x in shards)  # of rank 0, which has the largest
    trained = [x.to_local() for x in model.parameters() if x.requires_grad]
    assert predicted.gradients == sum(x.nbytes for x in trained)
    assert predicted.moments == 2 * predicted.gradients
    assert whole.weights / ranks_of <= predicted.weights < whole.weights
    model(PackedBatch.pack([[1, 2, 3]]))
    gathered = sum(x.nbytes for x in model.parameters())
    assert gathered == whole.weights
    assert predicted.gathered == gathered
    assert predicted.gathering == max(sum(x.nbytes for x in unit) for unit in units_of(model))


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
@pytest.mark.parametrize("ranks_of", [3], indirect=True)
def test_shards_are_stepped_as_the_rows_of_whole_weights(ranks_of, optimizer):
    if optimizer == "lion":
        pytest.importorskip("lion_pytorch")
    model, section = model_of(False), TrainSection(optimizer=optimizer, ema_decay=0.9)
    whole = Optimizer(model_of(False), section)
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks_of,)))
    sharded = Optimizer(model, section)
    for step in (1, 2):
        for name, weight in whole.weights.items():
            weight.grad = torch.randn_like(weight)
            sharded.weights[name].grad = sharded_like(
                sharded.weights[name], weight.grad[own_rows(sharded.weights[name])]
            )
        for each in (whole, sharded):
            each.step(1e-2)
            each.update_average(step)
    for name, weight in whole.weights.items():
        rows = own_rows(sharded.weights[name])
        for one, other in ((sharded.weights[name], weight), (sharded.average[name], whole.average[name])):
            torch.testing.assert_close(local(one), other[rows], rtol=5e-7, atol=1e-8)  # SIMD blocks begin elsewhere


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_weights_and_reductions_by_hand(dtype):
    size = dtype.itemsize
    units = [[torch.empty(n, 2, device="meta", requires_grad=True)] for n in (20, 20, 50, 1)]
    always, never = (rank_memory(units, 4, dtype, reshard) for reshard in (True, False))
    assert never.gathered == size * 2 * (50 + 20 + 20 + 1)
    assert always.gathered == size * 2 * (50 + 20)
    assert (never.gathering, always.gathering) == (size * 2 * 50, 0)
    assert never.reduction == always.reduction == (size + 4) * 100
    assert never.weights == 4 * 2 * (13 + 5 + 5 + 1)
    assert never.standing == 3 * never.weights
    for x in units[2]:
        x.requires_grad_(False)
    assert rank_memory(units, 4, dtype).reduction == (size + 4) * 40


def test_the_cheaper_schedule_that_fits_is_taken():
    def chosen(never, always, setting="auto"):
        plans = [Plan(8, peak_bytes=peak, cost=cost) for peak, cost in (never, always)]
        reshard, plan = choose_reshard(100, lambda reshard: plans[reshard], setting)
        assert plan is plans[reshard]
        return reshard

    assert not chosen((90, 5), (80, 6))
    assert chosen((90, 6), (80, 5))
    assert chosen((110, 5), (90, 6))
    assert not chosen((90, 5), (90, 5))
    assert chosen((130, 5), (120, 6))  # nothing fits
    assert not chosen((110, 6), (90, 5), "never")
    assert chosen((90, 5), (110, 6), "always")
