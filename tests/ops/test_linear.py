import gc

import pytest
import torch
from torch.nn import functional as F

from pyqemb import _C, ops
from pyqemb.ops.common import empty
from pyqemb.ops.linear import add_known_output


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 8, 4), (1, 3, 5), (700, 512, 1024)])
def test_equals_torch(shape, dtype):
    tokens, inputs, outputs = shape
    x, weight = torch.randn(tokens, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    dout = torch.randn(tokens, outputs).to(dtype)
    results = []
    for function in (ops.linear, F.linear):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck_and_second_derivatives():
    x, weight = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(ops.linear, (x, weight))
    assert torch.autograd.gradgradcheck(ops.linear, (x, weight))


def test_frozen_parts_get_no_gradient_and_cost_no_product(monkeypatch):
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    out = ops.linear(x, weight).sum()
    products = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out, mm=torch.mm: products.append(out.shape) or mm(a, b, out=out))
    out.backward()
    assert x.grad is not None
    assert weight.grad is None
    assert products == [x.shape]


def test_autocast_is_torchs():
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("x", "weight", "error", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(5, 6), ValueError, "share their inputs, got 4 and 6"),
        (torch.zeros(4), torch.zeros(5, 4), ValueError, r"x must have two dimensions, got shape \[4\]"),
        (torch.zeros(3, 4), torch.zeros(5, 4).double(), TypeError, "weight must have the dtype of x"),
        ([1.0], torch.zeros(5, 4), TypeError, "x must be a torch.Tensor"),
    ],
)
def test_bad_arguments_are_named(x, weight, error, message):
    with pytest.raises(error, match=message):
        ops.linear(x, weight)


def large(count=2 << 20):
    return empty((count,), torch.float32, torch.device("cpu"))


def test_memory_of_a_result_is_handed_out_again_and_never_shared():
    _C.release_kept()
    first, second = large().fill_(1), large().fill_(2)
    assert first.data_ptr() != second.data_ptr()
    assert (first == 1).all()
    assert (second == 2).all()
    assert first.data_ptr() % 64 == 0
    place, view = first.data_ptr(), first[5:]
    del first
    gc.collect()
    third = large().fill_(3)
    assert third.data_ptr() != place, "a view still holds the first block"
    assert (view == 1).all(), "a view still holds the first block"
    del view
    gc.collect()
    assert _C.kept_bytes() >= 8 << 20
    assert large().data_ptr() == place
    _C.release_kept()
    assert _C.kept_bytes() == 0
    assert (second == 2).all()
    assert (third == 3).all()


def test_no_more_is_kept_than_was_in_use_at_once():
    _C.release_kept()
    blocks = [large() for _ in range(3)]
    del blocks
    gc.collect()
    assert _C.kept_bytes() == 3 * 8 << 20
    other = large(5 << 20)  # 20 of 24 MiB: what is kept must make room
    assert _C.kept_bytes() <= 4 << 20
    assert other.fill_(1).sum() == 5 << 20


@pytest.mark.parametrize("residual_dtype", [torch.float64, torch.float32], ids=str)
def test_a_known_sum_is_not_computed_again(residual_dtype, monkeypatch):
    x, weight = torch.randn(7, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    residual, dout = torch.randn(7, 5).to(residual_dtype), torch.randn(7, 5).to(residual_dtype)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, residual)]
    computed = leaves[2] + ops.linear(*leaves[:2]).to(residual_dtype)
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: products.append(out.shape) or mm(a, b, out=out))
    known = add_known_output(*leaves, computed.detach())
    assert not products
    assert torch.equal(known, computed)
    for ours, truth in zip(*(torch.autograd.grad(total, leaves, dout) for total in (known, computed)), strict=True):
        assert torch.equal(ours, truth)
