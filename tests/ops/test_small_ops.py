import pytest
import torch

from pyqemb import _C, ops
from pyqemb.ops.common import arithmetic
from pyqemb.testing import reference
from pyqemb.testing.compare import assert_close_as

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def angles(tokens, head_dim, dtype):
    turn = torch.arange(tokens)[:, None] * 0.7 ** torch.arange(head_dim // 2)
    return turn.cos().to(arithmetic(dtype)), turn.sin().to(arithmetic(dtype))


def case(op, dtype, size="odd"):
    """(our function, the same in plain torch, inputs): the size is no multiple of any vector or block."""
    rows, width = {"odd": (700, 45), "tiny": (1, 3), "none": (0, 8)}[size]
    if op == "rms_norm":
        return ops.rms_norm, reference.rms_norm, [torch.randn(rows, width), torch.rand(width) + 0.5]
    if op == "rms_norm after adding":

        def naive(x, weight, residual):
            return torch.stack((reference.rms_norm(x + residual, weight), x + residual))

        tensors = [torch.randn(rows, width), torch.rand(width) + 0.5, torch.randn(rows, width)]
        return lambda x, w, r: torch.stack(ops.rms_norm(x, w, residual=r)), naive, tensors
    if op == "swiglu":
        return ops.swiglu, reference.swiglu, [torch.randn(rows, width) * 4, torch.randn(rows, width)]
    head_dim = 2 * width
    cos, sin = angles(rows, head_dim, dtype)
    if op == "rope":
        return (
            lambda x: ops.rope(x, cos, sin),
            lambda x: reference.rope(x, cos, sin),
            [torch.randn(rows, 3, head_dim)],
        )
    return (
        lambda x, w: ops.qk_norm_rope(x, w, cos, sin),
        lambda x, w: reference.qk_norm_rope(x, w, cos, sin),
        [torch.randn(rows, 3, head_dim), torch.rand(head_dim) + 0.5],
    )


def test_results_larger_than_the_caches():
    """They are written past the caches; one element more than whole vectors, and memory that is not aligned."""
    gate, up = (torch.randn((4 << 20) + 18)[1:] for _ in range(2))
    leaves = [x.requires_grad_() for x in (gate, up)]
    actual = [ops.swiglu(*leaves), *torch.autograd.grad(ops.swiglu(*leaves).sum(), leaves)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth = [reference.swiglu(*wide), *torch.autograd.grad(reference.swiglu(*wide).sum(), wide)]
    for a, b in zip(actual, truth, strict=True):
        assert (a - b).abs().max() < 2e-6


def test_rms_norm_where_only_the_sum_is_used():
    x, residual = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    _, total = ops.rms_norm(x, torch.ones(8), residual=residual)
    total.sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8))
    assert torch.equal(residual.grad, torch.ones(3, 8))


def run(function, tensors, dout, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]


OPS = ["rms_norm", "qk_norm_rope", "rope", "swiglu"]
CASES = [*OPS, "rms_norm after adding"]


@pytest.mark.parametrize("size", ["odd", "tiny", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", CASES)
def test_equals_float64_as_well_as_torch_does(op, dtype, size):
    ours, naive, tensors = case(op, dtype, size)
    tensors = [x.to(dtype) for x in tensors]
    dout = torch.randn(ours(*tensors).shape).to(dtype)
    actual, low, truth = (
        run(ours, tensors, dout, dtype),
        run(naive, tensors, dout, dtype),
        run(naive, tensors, dout, torch.float64),
    )
    for name, a, b, c in zip(("out", "first", "second", "third"), actual, low, truth, strict=False):
        assert_close_as(a, b, c, name)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    cos, sin = angles(3, 6, torch.float64)
    functions = {
        "rms_norm": (ops.rms_norm, (2, 5), (5,)),
        "swiglu": (ops.swiglu, (2, 5), (2, 5)),
        "qk_norm_rope": (lambda x, w: ops.qk_norm_rope(x, w, cos, sin), (3, 2, 6), (6,)),
        "rope": (lambda x: ops.rope(x, cos, sin), (3, 2, 6)),
    }
    function, *shapes = functions[op]
    torch.autograd.gradcheck(function, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes])


@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("op", OPS)
def test_every_instruction_set_on_any_thread_count(op, isa):
    ours, naive, tensors = case(op, torch.float32)
    dout = torch.randn(tensors[0].shape)
    truth = run(naive, tensors, dout, torch.float64)
    best, threads, results = _C.current_isa(), torch.get_num_threads(), []
    try:
        _C.set_isa(isa)
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(ours, tensors, dout, torch.float32))
    finally:
        _C.set_isa(best)
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for actual, exact in zip(results[0], truth, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-4)


def test_swiglu_does_not_overflow():
    gate = torch.tensor([-200.0, -90, 0, 90, 200], requires_grad=True)
    out = ops.swiglu(gate, torch.ones(5))
    out.sum().backward()
    torch.testing.assert_close(out.detach(), torch.tensor([0.0, 0, 0, 90, 200]))
    assert torch.isfinite(gate.grad).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.rms_norm(torch.ones(2, 4), torch.ones(3)), ValueError, "weight must have shape"),
        (lambda: ops.rms_norm(torch.ones(2, 4), torch.ones(4).double()), TypeError, "weight must have the dtype of x"),
        (lambda: ops.rms_norm(torch.ones(2, 4), torch.ones(4), eps=-1), ValueError, "eps must not be negative"),
        (lambda: ops.rms_norm(torch.tensor(1.0), torch.ones(1)), ValueError, "x must have shape"),
        (
            lambda: ops.rms_norm(torch.ones(2, 4), torch.ones(4), residual=torch.ones(2, 5)),
            ValueError,
            "residual must have the shape of x",
        ),
        (
            lambda: ops.rms_norm(torch.ones(2, 4), torch.ones(4), residual=torch.ones(2, 4).double()),
            TypeError,
            "residual must have the dtype of x",
        ),
        (lambda: ops.rms_norm([1.0], torch.ones(1)), TypeError, "x must be a torch.Tensor"),
        (
            lambda: ops.qk_norm_rope(torch.ones(2, 1, 3), torch.ones(3), torch.ones(2, 1), torch.ones(2, 1)),
            ValueError,
            "even",
        ),
        (
            lambda: ops.qk_norm_rope(torch.ones(2, 1, 4), torch.ones(4), torch.ones(3, 2), torch.ones(2, 2)),
            ValueError,
            "cos",
        ),
        (
            lambda: ops.qk_norm_rope(torch.ones(2, 4), torch.ones(4), torch.ones(2, 2), torch.ones(2, 2)),
            ValueError,
            "x must",
        ),
        (lambda: ops.swiglu(torch.ones(3), torch.ones(4)), ValueError, "up must have the shape of gate"),
        (lambda: ops.swiglu(torch.ones(3).int(), torch.ones(3).int()), TypeError, "gate must be float32"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
