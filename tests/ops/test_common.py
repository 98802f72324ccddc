"""What all ops share: memory for results, offsets for the kernels, and how native functions become torch ops."""

from itertools import count
from types import SimpleNamespace

import pytest
import torch

from pyqemb import _C
from pyqemb.ops import common
from pyqemb.ops.checks import shapes_only

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def blocks(monkeypatch):
    """The sizes that the buffer cache is asked for."""
    asked, real = [], _C.Block
    monkeypatch.setattr(common._C, "Block", lambda size: (asked.append(size), real(size))[1])
    return asked


def test_arithmetic():
    assert common.arithmetic(torch.float64) is torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert common.arithmetic(dtype) is torch.float32


@pytest.mark.parametrize(
    ("shape", "dtype", "cached"),
    [
        ((512, 512), torch.float32, True),
        ((512, 511), torch.float32, False),
        ((512, 512), torch.bfloat16, False),
        ((2, 512, 512), torch.bfloat16, True),
        ((131072,), torch.float64, True),
        ((131071,), torch.float64, False),
        ((), torch.float32, False),
        ((0, 5), torch.float32, False),
    ],
)
def test_large_results_come_from_the_cache(monkeypatch, shape, dtype, cached):
    asked = blocks(monkeypatch)
    found = common.empty(shape, dtype, CPU)
    assert (tuple(found.shape), found.dtype, found.device) == (shape, dtype, CPU)
    assert found.is_contiguous()
    assert asked == ([found.nbytes] if cached else [])
    found.fill_(1)


def test_results_on_other_devices_come_from_torch(monkeypatch):
    asked = blocks(monkeypatch)
    found = common.empty((1024, 1024), torch.float32, torch.device("meta"))
    assert (found.device.type, found.dtype, found.shape) == ("meta", torch.float32, (1024, 1024))
    assert asked == []


@pytest.mark.parametrize(
    ("shape", "dtype", "wanted", "cached"),
    [
        ((512, 512), torch.float32, None, True),
        ((512, 256), torch.float32, torch.float64, True),
        ((512, 256), torch.float32, None, False),
        ((512, 512), torch.bfloat16, torch.float32, True),
        ((512, 255), torch.float32, torch.float64, False),
        ((4, 2), torch.float32, torch.float64, False),
    ],
)
def test_memory_like_another_tensor(monkeypatch, shape, dtype, wanted, cached):
    asked = blocks(monkeypatch)
    for x in (torch.zeros(shape, dtype=dtype), torch.zeros(shape[::-1], dtype=dtype).T):
        asked.clear()
        found = common.empty_like(x, wanted)
        assert (found.shape, found.dtype, found.device) == (x.shape, wanted or dtype, CPU)
        assert found.is_contiguous()
        assert asked == ([found.nbytes] if cached else [])
    meta = common.empty_like(torch.zeros(1024, 1024, device="meta"), wanted)
    assert (meta.device.type, meta.dtype) == ("meta", wanted or torch.float32)


class Lengths:
    """Stands for a tensor on a device that need not exist."""

    def __init__(self, device, calls):
        self.device, self.calls = torch.device(device), calls

    def contiguous(self):
        self.calls.append("contiguous")
        return self

    def cpu(self):
        self.calls.append("cpu")
        return Lengths("cpu", self.calls)

    def pin_memory(self):
        self.calls.append("pinned")
        return self

    def to(self, device, non_blocking=False):
        self.calls.append("to without waiting" if non_blocking else "to")
        return Lengths(device, self.calls)


@pytest.mark.parametrize(
    ("given", "kernels", "expected"),
    [
        ("cpu", CPU, ["contiguous", "cpu"]),
        ("cuda", CPU, ["contiguous", "cpu"]),
        ("cuda", GPU, ["contiguous"]),
        ("cpu", GPU, ["contiguous", "checked", "pinned", "to without waiting"]),
    ],
)
def test_offsets_go_to_the_kernels(monkeypatch, given, kernels, expected):
    calls, seen = [], []
    lengths = Lengths(given, calls)
    monkeypatch.setattr(common, "tensor", lambda op, name, value: (seen.append((op, name)), value)[1])

    def check(*args):
        assert args == ("op", "lengths", lengths, 7, "q")
        calls.append("checked")

    monkeypatch.setattr(common._C, "check_cu_seqlens", check)
    found = common.at_kernels("op", "lengths", lengths, 7, "q", kernels)
    assert calls == expected
    assert found.device.type == kernels.type
    assert seen == [("op", "lengths")]
    if expected[1:2] == ["checked"]:
        calls.clear()
        with shapes_only("cuda"):
            common.at_kernels("op", "lengths", lengths, 7, "q", kernels)
        assert calls == ["contiguous", "to"]


def test_offsets_are_checked_before_they_are_copied():
    with pytest.raises(ValueError, match=r"\[op\] lengths must end at the number of tokens of q, 7, got 6"):
        common.at_kernels("op", "lengths", torch.tensor([0, 6], dtype=torch.int32), 7, "q", GPU)
    with pytest.raises(TypeError, match=r"^\[op\] lengths must be a torch\.Tensor, got list$"):
        common.at_kernels("op", "lengths", [0, 6], 6, "q", CPU)


_numbers = count()  # a name can be defined once


@pytest.fixture
def ops():
    """x -> (x^2, x^3) as a native op with a native gradient, and as functions of both results and of the first."""
    number = next(_numbers)

    def fake(x, scale):
        return x.new_empty(x.shape), x.new_empty(x.shape)

    def powers(x, scale):
        return scale * x * x, scale * x**3

    def powers_gradient(x, scale, g, h):
        return scale * (2 * x * g + 3 * x * x * h)

    def keep(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.scale, ctx.kept = inputs[1], output

    def gradient_of_both(gradient, ctx, g, h):
        assert len(ctx.kept) == 2
        return (gradient(*ctx.saved_tensors, ctx.scale, g, h),)

    def gradient_of_one(gradient, ctx, g):
        (x,) = ctx.saved_tensors
        return (gradient(x, ctx.scale, g, torch.zeros_like(g)),)

    native = common.native(f"test_powers_{number}(Tensor x, float scale) -> (Tensor, Tensor)", fake)(powers)
    other = common.native(f"test_first_power_{number}(Tensor x, float scale) -> (Tensor, Tensor)", fake)(powers)
    gradient = common.native(
        f"test_gradient_{number}(Tensor x, float scale, Tensor g, Tensor h) -> Tensor", lambda x, *_: common.new(x)
    )(powers_gradient)
    double = common.native(f"test_double_{number}(Tensor x) -> Tensor", lambda x: common.new(x))(lambda x: 2 * x)
    return SimpleNamespace(
        number=number,
        powers=native,
        first_power=other,
        both=common.differentiable("both", native, gradient, keep, gradient_of_both, inputs=1, results=2),
        one=common.differentiable("one", other, gradient, keep, gradient_of_one, inputs=1),
        twice=common.differentiable(
            "twice", double, None, lambda ctx, inputs, output: None, lambda gradient, ctx, g: (2 * g,), inputs=1
        ),
    )


def test_a_native_function_is_called_directly_or_as_an_op(ops):
    x, powers = torch.tensor([1.0, 2.0]), ops.powers
    assert powers.op is getattr(torch.ops.pyqemb, f"test_powers_{ops.number}").default
    assert torch.Tag.pt2_compliant_tag in powers.op.tags
    assert torch.Tag.needs_fixed_stride_order in powers.op.tags
    for found in (powers(x, 2.0), powers.op(x, 2.0)):
        assert [each.tolist() for each in found] == [[2, 8], [2, 16]]
    spied = common.Native(lambda *_: "raw", lambda *_: "op")
    assert spied(x) == "raw"
    with shapes_only("cpu"):
        assert spied(x) == "op"
        assert [each.shape for each in powers(x.to("meta"), 2.0)] == [(2,), (2,)]
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pyqemb::test_powers_{ops.number}", key)


def test_gradients_of_several_results(ops):
    for call in (ops.both, ops.powers.op):
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        square, cube = call(x, 2.0)
        (square.sum() + 10 * cube.sum()).backward()
        assert x.grad.tolist() == [2 * (2 + 30), 2 * (4 + 120)]
    with torch.no_grad():
        assert [each.tolist() for each in ops.both(torch.tensor([3.0]), 1.0)] == [[9], [27]]


def test_gradients_of_one_result(ops):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    found = ops.one(x, 2.0)
    assert isinstance(found, torch.Tensor)
    assert type(found.grad_fn).__name__ == "oneBackward"
    found.sum().backward()
    assert x.grad.tolist() == [4, 8]
    x = torch.tensor([3.0], requires_grad=True)
    doubled = ops.twice(x)
    doubled.backward()
    assert (doubled.tolist(), x.grad.tolist()) == ([6], [2])
    with torch.no_grad():
        assert ops.one(x, 1.0).tolist() == [9]
        assert ops.twice(x).tolist() == [6]


def test_gradients_of_several_inputs():
    from pyqemb import ops

    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    results = []
    for call in (
        lambda: ops.rms_norm(x, weight, eps=1e-2),
        lambda: torch.nn.functional.rms_norm(x, (8,), weight, 1e-2),
    ):
        found = call()
        results.append((found, *torch.autograd.grad(found.square().sum(), (x, weight))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_values_there_are_gradients_too(ops):
    with shapes_only("cpu"):
        x = torch.ones(2, device="meta", requires_grad=True)
        found = ops.one(x, 2.0)
        assert found.shape == (2,)
        found.sum().backward()
        assert x.grad.shape == (2,)
        assert [each.shape for each in ops.both(x, 2.0)] == [(2,), (2,)]


@pytest.mark.slow  # and torch.compile does not go through the functions of mutmut
def test_a_compiled_graph_has_gradients(ops):
    compiled = torch.compile(lambda x: ops.one(x, 3.0).sum(), backend="aot_eager", fullgraph=True)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    compiled(x).backward()
    assert x.grad.tolist() == [6, 12]


@pytest.mark.parametrize("name", ["one", "both", "first_power"])
def test_a_second_derivative_is_refused(ops, name):
    x = torch.tensor([1.0], requires_grad=True)
    found = (ops.first_power.op if name == "first_power" else getattr(ops, name))(x, 1.0)
    found = found if isinstance(found, torch.Tensor) else found[0]
    with pytest.raises(RuntimeError, match=r"^\[(one|both)\] is differentiable once: its gradient cannot be taken with "
                                           r"create_graph=True$"):  # fmt: skip
        torch.autograd.grad(found.sum(), x, create_graph=True)


def test_forward_mode_is_not_silently_wrong(ops):
    from torch.autograd import forward_ad

    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(torch.tensor([1.0]), torch.tensor([1.0]))
        with pytest.raises(RuntimeError, match="forward mode"):
            ops.one(dual, 1.0)


def test_memory_for_gradients():
    x = torch.zeros(2, 3, 4, dtype=torch.bfloat16).transpose(0, 1)
    assert (common.new(x).shape, common.new(x).dtype, common.new(x).is_contiguous()) == (x.shape, x.dtype, True)
    rows = common.new_rows(x)
    assert (rows.shape, rows.dtype) == ((3, 2), torch.float32)
    assert common.new_rows(torch.zeros(4, dtype=torch.float64)).shape == ()
    weight = torch.zeros(5, dtype=torch.float16)
    assert (common.new_gradient(weight, True).shape, common.new_gradient(weight, True).dtype) == ((5,), torch.float32)
    assert (common.new_gradient(weight, False).shape, common.new_gradient(weight, False).dtype) == ((0,), torch.float32)
    total = torch.tensor([1 / 3])
    assert common.rounded(total, weight, True).dtype == torch.float16
    assert common.rounded(total, weight, True).item() == torch.tensor(1 / 3, dtype=torch.float16).item()
    assert common.rounded(total, weight, False) is None
