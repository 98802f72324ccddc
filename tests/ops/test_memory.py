"""What ops do with memory: none is read before it is written, none is lost, rows may lie far apart."""

import gc
import importlib.util
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pyqemb import _C, ops
from pyqemb.data.batch import PackedBatch

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


MANY = 2**31 + 5


@pytest.mark.promise("R20", "2^31 tokens and more are refused, by ops, plans and batches")
@pytest.mark.parametrize("total", [2**31, MANY, 2**32 + 5], ids=["2^31", "2^31 + 5", "2^32 + 5"])
def test_more_tokens_than_int32_counts_are_refused(total):
    """The last of cu_seqlens is what the number of tokens becomes in int32: a check in int32 would accept it."""
    wrapped = torch.tensor([0, np.int64(total).astype(np.int32)], dtype=torch.int32)
    row = torch.zeros(1, 8)
    with pytest.raises(ValueError, match="cu_seqlens must"):
        ops.last_token_pool(row.expand(total, 8), wrapped)
    meta = torch.zeros(1, 2, 8).expand(total, 2, 8)
    with pytest.raises(ValueError, match="cu_seqlens must"):
        _C.attention_forward(
            meta, meta, meta, wrapped, wrapped, out=meta, lse=meta[..., 0], scale=1.0, causal=False, plan=None,
            sizes=(0, 0, 0, 0, 0),
        )  # fmt: skip
    with pytest.raises(ValueError, match="cu_seqlens must end at the number of tokens of q"):
        _C.check_cu_seqlens("attention_plan", "cu_seqlens", wrapped.clamp(min=0), total, "q")
    with pytest.raises(ValueError, match="tokens must be at most 2147483647"):
        ops.attention_plan(wrapped.clamp(min=0), tokens=total)
    with pytest.raises(TypeError, match="cu_seqlens must be int32"):
        ops.attention_plan(torch.tensor([0, total]))
    ids = torch.zeros(1, dtype=torch.int64).expand(total)
    with pytest.raises(ValueError, match="must rise from 0 to the number of tokens"):
        PackedBatch(ids, ids, wrapped, 1)


@pytest.mark.promise("R20", "batches of batches beyond 2^31 tokens are refused before memory is taken")
def test_batches_beyond_int32_are_refused():
    batch = PackedBatch.pack([[0] * (1 << 20)])
    before = resident()
    with pytest.raises(ValueError, match=f"a batch holds at most 2147483647 tokens, got {1 << 31}"):
        batch.select([0] * (1 << 11))
    with pytest.raises(ValueError, match="a batch holds at most 2147483647 tokens"):
        PackedBatch.concat([batch] * (1 << 11))
    with pytest.raises(ValueError, match="a batch holds at most 2147483647 tokens"):
        PackedBatch.pack([range(1 << 20)] * (1 << 12))
    assert resident() - before < 64 << 20


@pytest.mark.promise("R20", "ids of texts beyond 2^32, and counts of documents")
def test_indices_are_not_cut_to_int32():
    queries, documents = normalize(torch.randn(4, 16), dim=1), normalize(torch.randn(6, 16), dim=1)
    at, ids = torch.arange(4), torch.arange(6)
    plain = ops.info_nce(queries, documents, at, document_ids=ids)
    assert torch.equal(plain, ops.info_nce(queries, documents, at, document_ids=ids << 32))
    assert not torch.equal(plain, ops.info_nce(queries, documents, at, document_ids=ids % 2))
    for wrong in (2**32, 2**32 + 1, 2**63 - 1):
        for name in ("positive", "owner"):
            given = {"positive": at.clone(), "owner": torch.full((6,), -1)}
            given[name][1] = wrong
            with pytest.raises(ValueError, match=f"{name} must be from"):
                ops.info_nce(queries, documents, given["positive"], owner=given["owner"])
        with pytest.raises(ValueError, match="exclude must be from"):
            ops.top_k(queries, documents, 1, exclude=torch.full((4, 1), wrong))
    with pytest.raises(ValueError, match=r"documents must number fewer than 2\^32"):
        ops.top_k(torch.zeros(1, 0), torch.zeros(2**32, 0), 1)


@pytest.mark.deep
@pytest.mark.promise("R20", "top_k over 2^31 + 5 documents")
def test_more_documents_than_int32_counts():
    try:
        memory = mmap.mmap(-1, MANY * 2, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    except OSError as error:
        pytest.skip(f"no address space: {error}")
    documents = torch.frombuffer(memory, dtype=torch.float16)[:, None]
    documents[[3, 2**31 - 1, 2**31 + 2], 0] = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16)
    scores, indices = ops.top_k(torch.ones(1, 1, dtype=torch.float16), documents, 4)
    assert indices.tolist() == [[2**31 + 2, 2**31 - 1, 3, 0]]
    assert scores.tolist() == [[3.0, 2.0, 1.0, 0.0]]


@pytest.mark.promise("R20", "rows 2^30 elements apart, attention, pooling, InfoNCE and top_k")
def test_rows_may_lie_far_apart(far):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    lengths = torch.tensor([0, 2, 5], dtype=torch.int32)

    def gradients(op, *leaves):
        leaves = [x.requires_grad_() for x in leaves]
        out = op(*leaves)
        return [out, *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view(out.shape))]

    def attention(q, k, v):
        return ops.varlen_attention(q, k, v, lengths)

    q, k, v = random(5, 4, 8), random(5, 2, 8), random(5, 2, 8)
    for one, other in zip(gradients(attention, far(q), far(k), far(v)), gradients(attention, q, k, v), strict=True):
        assert torch.equal(one, other)
    hidden = random(5, 16)
    assert torch.equal(ops.last_token_pool(far(hidden), lengths), ops.last_token_pool(hidden, lengths))
    queries, documents = normalize(random(4, 16), dim=1), normalize(random(6, 16), dim=1)
    at = torch.arange(4)
    assert torch.equal(ops.info_nce(far(queries), far(documents), at), ops.info_nce(queries, documents, at))
    for one, other in zip(ops.top_k(far(queries), far(documents), 3), ops.top_k(queries, documents, 3), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(ops.rms_norm(far(hidden), torch.ones(16)), ops.rms_norm(hidden, torch.ones(16)))
