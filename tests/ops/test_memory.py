"""What ops do with memory: none is read before it is written, none is lost, rows may lie far apart."""

import gc
import importlib.util
import mmap
import os
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pyqemb import ops

spec = importlib.util.spec_from_file_location("catalogue_of_calls", Path(__file__).with_name("test_arguments.py"))
calls = importlib.util.module_from_spec(spec)
spec.loader.exec_module(calls)
OPS = [name for name in calls.catalogue() if name in ops.__all__]


def tensors_of(value):
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors_of(part)] if isinstance(value, tuple | list) else []


def results(op):
    """What a call gives, and the gradients of its sum."""
    leaves = {
        name: x.detach().clone().requires_grad_()
        for name, x in op.arguments.items()
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    given = tensors_of(op(**leaves))
    sums = [x.double().sum() for x in given if x.requires_grad]
    if not sums:
        return given
    return [
        *given,
        *(x for x in torch.autograd.grad(sum(sums), list(leaves.values()), allow_unused=True) if x is not None),
    ]


@pytest.fixture
def poison():
    """torch.empty is full of NaN, or of the largest integers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.promise("R16", "each op, forward and backward, with torch.empty full of NaN")
@pytest.mark.parametrize("name", OPS)
def test_what_is_not_written_is_not_read(name, poison):
    op = calls.catalogue()[name]
    poisoned = results(op)
    torch.use_deterministic_algorithms(False)
    clean = results(op)
    assert len(poisoned) == len(clean)
    for one, other in zip(poisoned, clean, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=False)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.promise("R21", "1,500 calls of each op and 1,500 that fail")
@pytest.mark.parametrize("name", OPS)
def test_calls_lose_nothing(name):
    op = calls.catalogue()[name]
    wrong = next(iter(op.rules))

    def work():
        for _ in range(500):
            results(op)
            with pytest.raises(calls.ERRORS):
                op(**{wrong: object()})
        gc.collect()  # errors and their frames refer to each other

    work()
    sizes = [resident()]
    open_files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        work()
        sizes.append(resident())
    assert min(b - a for a, b in zip(sizes, sizes[1:], strict=False)) < 256 << 10, sizes
    assert len(os.listdir("/proc/self/fd")) <= open_files
    assert threading.active_count() <= threads


ROW = 1 << 30  # elements from a row to the next


@pytest.fixture(scope="module")
def far():
    """far(x): the values of x in rows that are 2^30 elements apart, in memory of which only these rows are there."""
    maps = []

    def place(x):
        size = (len(x) * ROW + x[0].numel()) * x.element_size()
        try:
            maps.append(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000))  # MAP_NORESERVE
        except OSError as error:
            pytest.skip(f"no address space of {size >> 30} GiB: {error}")
        flat = torch.frombuffer(maps[-1], dtype=x.dtype)
        rows = flat.as_strided(x.shape, (ROW, *x.stride()[1:]))
        rows.copy_(x)
        return rows

    return place


@pytest.mark.promise("R20", "rows 2^30 elements apart, attention, pooling, InfoNCE and top_k")
def test_rows_may_lie_far_apart(far):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    lengths = torch.tensor([0, 2, 5], dtype=torch.int32)
    q, k, v = random(5, 4, 8), random(5, 2, 8), random(5, 2, 8)
    assert torch.equal(ops.varlen_attention(far(q), far(k), far(v), lengths), ops.varlen_attention(q, k, v, lengths))
    hidden = random(5, 16)
    assert torch.equal(ops.last_token_pool(far(hidden), lengths), ops.last_token_pool(hidden, lengths))
    queries, documents = normalize(random(4, 16), dim=1), normalize(random(6, 16), dim=1)
    at = torch.arange(4)
    assert torch.equal(ops.info_nce(far(queries), far(documents), at), ops.info_nce(queries, documents, at))
    for one, other in zip(ops.top_k(far(queries), far(documents), 3), ops.top_k(queries, documents, 3), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(ops.rms_norm(far(hidden), torch.ones(16)), ops.rms_norm(hidden, torch.ones(16)))
