"""Sharded tensors, as each of four ranks sees them; collectives run in tests/training."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pyqemb.model import shards
from pyqemb.model.shard_files import Slice, sharded_like

RANKS, ROWS = 4, 10  # rows: 3, 3, 3, 1


@pytest.fixture(params=range(RANKS))
def rank(request):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=RANKS)
    yield request.param
    dist.destroy_process_group()


def distributed(rows, rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh, whole = init_device_mesh("cpu", (RANKS,)), torch.arange(2.0 * rows).view(rows, 2)
    own = whole.chunk(RANKS)[rank] if rank < len(whole.chunk(RANKS)) else whole[:0]
    return whole, own, DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=(2, 1))


@pytest.mark.parametrize("rows", [ROWS, 4, 2, 1])
def test_the_rows_of_a_rank(rank, rows):
    whole, own, x = distributed(rows, rank)
    assert shards.is_sharded(x)
    assert shards.local(x).equal(own)
    assert shards.local(x).data_ptr() == own.data_ptr()
    found = shards.own_rows(x)
    assert whole[found].equal(own)
    each = -(-rows // RANKS)
    assert found == slice(min(rank * each, rows), min((rank + 1) * each, rows))
    part = Slice.of(x)
    assert (part.first, part.shape) == (found.start, (rows, 2))
    assert part.tensor.equal(own)
    assert part.is_whole == (len(own) == rows)
    like = sharded_like(x, 2 * own)
    assert shards.is_sharded(like)
    assert (like.shape, like.stride(), like.placements) == (x.shape, x.stride(), x.placements)
    assert like.device_mesh is x.device_mesh
    assert like.to_local().equal(2 * own)


def test_who_writes(rank):
    module = nn.Linear(2, 2, bias=False)
    assert not shards.has_shards(module)
    assert shards.is_writer(module)
    module.weight = nn.Parameter(distributed(ROWS, rank)[2])
    assert shards.has_shards(module)
    assert shards.is_writer(module) == (rank == 0)


def test_plain_tensors():
    x = torch.ones(3, 2, requires_grad=True)
    assert not shards.is_sharded(x)
    assert not shards.is_sharded("x")
    assert shards.local(x) is x
    assert shards.own_rows(x) == slice(0, 3)
    assert shards.own_rows(torch.tensor(1.0)) == slice(0, 1)
    full = shards.full_tensor(x, torch.bfloat16)
    assert full.equal(x)
    assert full.dtype == torch.float32  # as it is
    assert not full.requires_grad


def test_without_dtensors_nothing_is_imported(monkeypatch):
    monkeypatch.setitem(shards.sys.modules, "torch.distributed.tensor", None)
    assert not shards.is_sharded(torch.ones(1))


def test_the_whole_of_a_sharded_tensor_has_the_dtype_of_computing(monkeypatch):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x = distribute_tensor(torch.arange(6.0).view(3, 2) + 1 / 3, init_device_mesh("cpu", (1,)), [Shard(0)])
        x.requires_grad_(True)
        full = shards.full_tensor(x, torch.bfloat16)
        assert type(full) is torch.Tensor
        assert full.dtype == torch.bfloat16
        assert not full.requires_grad
        assert full.equal((torch.arange(6.0).view(3, 2) + 1 / 3).bfloat16())
    finally:
        dist.destroy_process_group()
