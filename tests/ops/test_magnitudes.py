"""Rows of any magnitude: sums of squares that overflow or vanish in the arithmetic type, and rows of zeros."""

import pytest
import torch

from pyqemb import _C, ops
from pyqemb.ops.prefixes import over_prefixes, unit_rows
from pyqemb.testing.cases import cu_seqlens

MAGNITUDES = {
    torch.float64: (1e300, 1e200, 1e30, 1e-30, 1e-200, 1e-300),
    torch.float32: (1e38, 1e30, 1e19, 1e-19, 1e-30, 1e-36),
    torch.bfloat16: (1e38, 1e30, 1e-30),
    torch.float16: (3e4, 1e-4),
}
CASES = [(dtype, magnitude) for dtype, several in MAGNITUDES.items() for magnitude in several]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=_C.available_isas(), autouse=True)
def isa(request):
    before = _C.current_isa()
    _C.set_isa(request.param)
    yield
    _C.set_isa(before)


def row(size, dtype, seed=0):
    """A power of two times it is exact."""
    return (torch.rand(1, size, generator=torch.Generator().manual_seed(seed)) + 0.25).to(dtype)


def power(magnitude):
    return 2.0 ** round(torch.tensor(magnitude, dtype=torch.float64).log2().item())


def assert_close(actual, exact, dtype):
    assert ((actual.double() - exact).norm() / exact.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize(("dtype", "magnitude"), CASES)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("size", [7, 96])
def test_a_row_pools_to_its_direction(dtype, magnitude, with_norm, size):
    base, scale = row(size, dtype), power(magnitude)
    hidden = (base.double() * scale).to(dtype).requires_grad_()
    weight = torch.ones(size, dtype=dtype) if with_norm else None
    out = ops.last_token_pool(hidden, cu_seqlens((1,)), norm_weight=weight, eps=0.0)
    exact = base.double().requires_grad_()
    truth = exact / exact.norm()
    assert_close(out, truth, dtype)
    dout = row(size, dtype, 1)
    (ours,), (gradient,) = torch.autograd.grad(out, hidden, dout), torch.autograd.grad(truth, exact, dout.double())
    if dtype == torch.float64 or 1e-30 <= magnitude <= (
        1 if dtype == torch.float16 else 1e30
    ):  # the gradient is normal
        assert_close(ours.double() * scale, gradient, dtype)


@pytest.mark.parametrize(("dtype", "magnitude"), CASES)
def test_rms_norms_of_a_row(dtype, magnitude):
    base, scale = row(96, dtype), power(magnitude)
    weight, ones, zeros = torch.ones(96, dtype=dtype), torch.ones(1, 48), torch.zeros(1, 48)
    if dtype == torch.float64:
        ones, zeros = ones.double(), zeros.double()
    exact = base.double().requires_grad_()
    truth = exact * exact.square().mean().rsqrt()
    dout = row(96, dtype, 1)
    (gradient,) = torch.autograd.grad(truth, exact, dout.double())
    for norm in (
        lambda x, w: ops.rms_norm(x, w, 0.0),
        lambda x, w: ops.rms_norm(x, w, 0.0, residual=torch.zeros_like(x))[0],
        lambda x, w: ops.qk_norm_rope(x[:, None], w, ones, zeros, 0.0)[:, 0],
    ):
        x, w = (base.double() * scale).to(dtype).requires_grad_(), weight.clone().requires_grad_()
        out = norm(x, w)
        assert_close(out, truth, dtype)
        ours, of_weight = torch.autograd.grad(out, (x, w), dout)
        assert_close(of_weight, (dout.double() * truth)[0], dtype)
        if dtype == torch.float64 or 1e-30 <= magnitude <= (
            1 if dtype == torch.float16 else 1e30
        ):  # the gradient is normal
            assert_close(ours.double() * scale, gradient, dtype)


@pytest.mark.parametrize("dtype", MAGNITUDES, ids=str)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("dim", [None, 3])
def test_a_row_of_zeros_stays_zero_and_so_does_its_gradient(dtype, with_norm, dim):
    hidden = torch.zeros(3, 20, dtype=dtype)
    hidden[0] = 1
    hidden[1, 3:] = 1  # with dim = 3 its prefix alone is zero
    hidden.requires_grad_()
    weight = torch.ones(20, dtype=dtype, requires_grad=True) if with_norm else None
    for eps in (1e-6, 0.0):
        out = ops.last_token_pool(hidden, cu_seqlens((1, 1, 1)), norm_weight=weight, eps=eps, dim=dim)
        grads = torch.autograd.grad(out, [hidden] if weight is None else [hidden, weight], torch.rand_like(out))
        empty = [2] if dim is None else [1, 2]
        assert (out[empty] == 0).all()
        assert (grads[0][empty] == 0).all()
        assert all(x.isfinite().all() for x in (out, *grads))
        assert out[0].norm() > 0.9


def test_infinity_and_nan_do_not_become_a_direction():
    hidden = torch.ones(2, 8)
    hidden[0, 3], hidden[1, 3] = torch.inf, torch.nan
    out = ops.last_token_pool(hidden, cu_seqlens((1, 1)))
    assert out[0, 3].isnan()
    assert out[1].isnan().all()


def test_a_prefix_of_zeros_has_no_gradient():
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (4, 9))
    queries[1, :5] = documents[6, :5] = 0
    results = []
    for dims in ([5], [12, 5]):
        leaves = [queries.clone().requires_grad_(), documents.clone().requires_grad_()]
        loss = ops.info_nce(*leaves, torch.arange(4), matryoshka=dims, temperature=0.5)
        assert loss.isfinite()
        results.append(torch.autograd.grad(loss, leaves))
    assert (results[0][0][1] == 0).all()
    assert (results[0][1][6] == 0).all()
    assert all(x.abs().max() < 1e3 for grads in results for x in grads)
    # What takes a sweep for each prefix agrees.
    leaves = [queries.clone().requires_grad_(), documents.clone().requires_grad_()]
    loss = over_prefixes(
        lambda q, d: ops.info_nce(q, d, torch.arange(4), temperature=0.5), [5, 12], [0.5, 0.5], *leaves
    )
    for ours, other in zip(torch.autograd.grad(loss, leaves), results[1], strict=True):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize(("dtype", "magnitude"), [case for case in CASES if case[0] in (torch.float64, torch.float32)])
def test_unit_rows(dtype, magnitude):
    base = row(9, dtype)
    x = torch.cat([(base.double() * power(magnitude)).to(dtype), torch.zeros_like(base)]).requires_grad_()
    out = unit_rows(x)
    assert_close(out[:1], base.double() / base.double().norm(), dtype)
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert (out[1] == 0).all()
    assert (gradient[1] == 0).all()
    assert not gradient.isnan().any()
