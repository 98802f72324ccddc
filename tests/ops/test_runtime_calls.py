"""No op makes the host wait for a GPU, tested without one: which torch operators the ops call on tensors that are said
to be on CUDA (FakeTensor has no memory), and which functions of the CUDA runtime the native code calls at all.

The kernels that an op launches are counted in tests/cuda_on_cpu/test_runtime_calls.cpp.
"""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)  # fmt: skip
from torch.utils._python_dispatch import TorchDispatchMode

from pyqemb import _C, ops
from pyqemb.ops import checks

ROOT = Path(__file__).parents[2]

# What neither waits for the device nor copies from the host's memory.
ALLOWED = {
    "_to_copy", "arange", "contiguous", "detach", "device", "empty", "empty_like", "mul", "mul_", "new_empty",
    "new_zeros", "ones_like", "reshape", "searchsorted", "sort", "sum", "to", "view",
}  # fmt: skip
# Of the CUDA runtime; cudaMemcpy, cudaMalloc, cudaFree and every synchronization are missing here.
RUNTIME = {
    "cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaGetDevice", "cudaGetDeviceCount", "cudaGetErrorString",
    "cudaGetLastError", "cudaMemsetAsync", "cudaSetDevice",
    "cudaGetDriverEntryPoint", "cudaGetDriverEntryPointByVersion",  # once, for the encoder of tensor maps
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Collects the names of the operators, and which of them connect two devices."""

    def __init__(self):
        super().__init__()
        self.names, self.between_devices = set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.add(function.overloadpacket.__name__)
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if len({x.device.type for x in tensors}) > 1:
            self.between_devices.append(str(function))
        return result


class Context:
    """What autograd hands to forward and backward. (Its engine needs the streams of a real device.)"""

    def __init__(self, inputs):
        self.needs_input_grad = [isinstance(x, torch.Tensor) and x.requires_grad for x in inputs]

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors):
        pass

    def set_materialize_grads(self, value):
        pass


@pytest.fixture
def on_cuda(monkeypatch):
    """Tensors are fake and may be on CUDA. -> the native functions that are called, and the backward passes to run"""
    called, backward = [], []

    def apply(function, *inputs):
        context = Context(inputs)
        out = function.forward(context, *inputs)
        backward.append((function, context, out))
        return out

    for name, value in vars(_C).items():
        if callable(value) and not isinstance(value, type):
            monkeypatch.setattr(_C, name, lambda *_, name=name, **__: called.append(name))
    monkeypatch.setattr(torch.autograd.Function, "apply", classmethod(apply))
    dispatch = FakeTensor.__torch_dispatch__
    monkeypatch.setattr(FakeTensor, "__torch_dispatch__", staticmethod(dispatch))  # the same object at every access
    monkeypatch.setattr(checks, "_NO_DISPATCH", dispatch)
    with FakeTensorMode():
        yield called, backward


def rows(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="cuda").requires_grad_(dtype.is_floating_point)


def attention():
    cu, data = rows(3, dtype=torch.int32), rows(9, dtype=torch.int32)
    plan = ops.AttentionPlan(cu, cu, 7, 7, data, (1, 0, 0, 0, 0))
    ops.varlen_attention(rows(7, 4, 64), rows(7, 2, 64), rows(7, 2, 64), None, plan=plan, causal=True)


def info_nce():
    ops.info_nce(rows(4, 64), rows(9, 64), rows(4, dtype=torch.int64))


def info_nce_with_owners():
    positive, owner, ids = (rows(n, dtype=torch.int64) for n in (4, 9, 9))
    options = dict(owner=owner, document_ids=ids, matryoshka=[64, 32], return_stats=True)
    ops.info_nce(rows(4, 64), rows(9, 64), positive, **options)


def last_token_pool():
    ops.last_token_pool(rows(7, 64), rows(3, dtype=torch.int32), norm_weight=rows(64))


def top_k():
    ops.top_k(rows(4, 64), rows(9, 64), 3, exclude=rows(4, 2, dtype=torch.int64))


def small_ops():
    x, weight = rows(7, 64), rows(64)
    normed, total = ops.rms_norm(ops.rms_norm(x, weight), weight, residual=x)
    angles = [rows(7, 16, dtype=torch.float32).detach() for _ in range(2)]
    ops.qk_norm_rope(ops.swiglu(normed, total).view(7, 2, 32), rows(32), *angles)


NATIVE = {
    attention: ["attention_forward", "attention_backward"],
    info_nce: ["check_info_nce", "info_nce"],
    info_nce_with_owners: ["check_info_nce", "info_nce"],
    last_token_pool: ["last_token_pool_forward", "last_token_pool_backward"],
    top_k: ["top_k"],
    small_ops: [
        *("rms_norm_forward", "rms_norm_forward", "swiglu_forward", "qk_norm_rope_forward"),
        *("qk_norm_rope_backward", "swiglu_backward", "rms_norm_backward", "rms_norm_backward"),
    ],
}


def waits(op, backward):
    """What an op calls, in both directions, that may make the host wait."""
    with Operators() as operators:
        with torch._C._AutoDispatchBelowAutograd():  # its nodes want a real device, too
            op()
        with torch.no_grad():
            for function, context, out in reversed(backward):
                function.backward(context, *map(torch.ones_like, out if isinstance(out, tuple) else (out,)))
    return operators.names - ALLOWED, operators.between_devices


@pytest.mark.parametrize("op", NATIVE, ids=lambda op: op.__name__)
def test_no_op_waits_for_the_device(op, on_cuda):
    called, backward = on_cuda
    assert waits(op, backward) == (set(), [])
    assert called == NATIVE[op]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: torch.ops.aten.nonzero(x),
        lambda x: torch.ops.aten.copy_(x, torch.ones(4)),
        lambda x: x.cpu(),
        lambda x: x.sum().item(),
        lambda x: x.index_put_((torch.zeros(2, dtype=torch.int64, device="cuda"),), torch.tensor(1.0)),
    ],
    ids=["nonzero", "copy", "cpu", "item", "index_put"],
)
def test_what_waits_is_seen(wait, on_cuda):
    def op():
        x = torch.empty(4, device="cuda")
        wait(x)
        return x

    try:
        names, between_devices = waits(op, [])
    except (DataDependentOutputException, DynamicOutputShapeException):  # a fake tensor has no value
        return
    assert names or between_devices


def test_the_native_code_calls_nothing_of_the_runtime_that_waits():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu", ".cuh", ".h")]
    called = {name for path in sources for name in re.findall(r"\bcuda[A-Z]\w+(?=\()", path.read_text())}
    assert called == RUNTIME
