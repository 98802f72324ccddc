"""The ops as torch.library knows them: schemas, fakes, gradients, compiled graphs; and which backend a call gets."""

import pytest
import torch
from torch.library import opcheck

from pyqemb import _C, ops
from pyqemb.ops.checks import shapes_only
from pyqemb.ops.groups import GROUPS
from pyqemb.testing.cases import cu_seqlens

CU = cu_seqlens((3, 0, 9, 1))


def leaf(*shape):
    return torch.randn(*shape).requires_grad_()


def angles(tokens, head_dim):
    turn = torch.rand(tokens, head_dim // 2)
    return turn.cos(), turn.sin()


def attention_inputs():
    return leaf(13, 4, 64), leaf(13, 2, 64), leaf(13, 2, 64), CU, CU, None, (0, 0, 0, 0, 0), 0.1, True


SAMPLES = {
    "varlen_attention": attention_inputs,
    "last_token_pool": lambda: (leaf(13, 24), leaf(24), CU, 1e-6, 16, True),
    "rms_norm": lambda: (leaf(5, 24), leaf(24), 1e-6),
    "add_rms_norm": lambda: (leaf(5, 24), leaf(5, 24), leaf(24), 1e-6),
    "qk_norm_rope": lambda: (leaf(5, 2, 16), leaf(16), *angles(5, 16), 1e-6),
    "swiglu": lambda: (leaf(5, 24), leaf(5, 24)),
    "info_nce": lambda: (
        *(leaf(5, 24), leaf(9, 24), None, torch.arange(5), None, None, torch.tensor([[1, 7]])),
        *(0, 5, (), (), True, False, torch.randn(5, 8), torch.randn(9, 8), 0.1, False),
        *(GROUPS, ["own"] * 8, [0.1] * 8, [False] * 8, [0.0] * 8, False, 0.0, 0.05, 0.2, 0.01),
    ),
    "top_k": lambda: (torch.randn(5, 24), torch.randn(9, 24), 3, None, None),
}


@pytest.mark.promise("R10", "opcheck of every op")
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    opcheck(getattr(torch.ops.pyqemb, name).default, SAMPLES[name]())


def layer(q, k, v, x, weight, head_weight, cos, sin):
    """Every differentiable op once."""
    attended = ops.varlen_attention(ops.qk_norm_rope(q, head_weight, cos, sin), k, v, CU, causal=True).flatten(1)
    normed, total = ops.rms_norm(attended, weight, residual=x)
    hidden = ops.rms_norm(ops.linear(ops.swiglu(normed, total), torch.eye(64, device=x.device)), weight)
    vectors = ops.last_token_pool(hidden, CU, norm_weight=weight, dim=32)
    positive = torch.arange(4, device=x.device)
    loss, stats = ops.info_nce(vectors, vectors.detach(), positive, return_stats=True)
    composed = ops.info_nce(vectors, vectors.detach(), positive, preset="gte", tau_plus=0.01)
    return loss + composed + hidden.sum(), stats


def test_a_compiled_graph_holds_every_op():
    torch.manual_seed(0)
    inputs = [leaf(13, 4, 16), leaf(13, 2, 16), leaf(13, 2, 16), leaf(13, 64), leaf(64), leaf(16), *angles(13, 16)]
    leaves = inputs[:6]
    eager, stats = layer(*inputs)
    compiled, compiled_stats = torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, eager)
    assert dict(compiled_stats) == dict(stats)
    grads = torch.autograd.grad(eager, leaves)
    for again, grad in zip(torch.autograd.grad(compiled, leaves), grads, strict=True):
        assert torch.equal(again, grad)


def test_without_values_every_op_has_its_shapes():
    inputs = [leaf(13, 4, 16), leaf(13, 2, 16), leaf(13, 2, 16), leaf(13, 64), leaf(64), leaf(16), *angles(13, 16)]
    loss, _ = layer(*inputs)
    grads = torch.autograd.grad(loss, inputs[:6])
    unreal = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in inputs]
    with shapes_only("cpu"):
        loss, _ = layer(*unreal)
        shapes = torch.autograd.grad(loss, unreal[:6])
    assert [x.shape for x in shapes] == [x.shape for x in grads]
    assert {x.device.type for x in (loss, *shapes)} == {"meta"}
    with pytest.raises(ValueError, match="must be on the CPU or on a CUDA device, got meta"):
        layer(*unreal)


def test_search_compiles_whole():
    queries, documents = torch.randn(3, 16), torch.randn(20, 16)
    compiled = torch.compile(lambda q, d: ops.top_k(q, d, 2), fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(queries, documents), ops.top_k(queries, documents, 2), strict=True):
        assert torch.equal(ours, eager)


def test_a_plan_is_the_lengths_on_the_cpu():
    q, k, v = (x.detach() for x in attention_inputs()[:3])
    plan = ops.attention_plan(CU)
    assert torch.equal(ops.varlen_attention(q, k, v, None, plan=plan), ops.varlen_attention(q, k, v, CU))
    last = ops.attention_plan(cu_seqlens((1, 0, 1, 1)), CU)
    rows = torch.tensor([2, 11, 12])
    alone = ops.varlen_attention(q[rows], k, v, None, plan=last)
    torch.testing.assert_close(alone, ops.varlen_attention(q, k, v, CU)[rows])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: ops.varlen_attention(q, q, q, None), TypeError, "cu_seqlens must be a torch.Tensor, got NoneType"),
        (
            lambda q: ops.varlen_attention(q, q, q, None, plan=ops.attention_plan(cu_seqlens((3,)))),
            ValueError,
            "plan is for 3 tokens of q and 3 of k, got 4 and 4",
        ),
        (lambda q: ops.attention_plan([0, 4]), TypeError, "cu_seqlens must be a torch.Tensor"),
        (lambda q: ops.attention_plan(torch.zeros(1, 2)), ValueError, "cu_seqlens must have shape"),
        (lambda q: ops.swiglu(q.to("meta"), q.to("meta")), ValueError, "gate must be on the CPU or on a CUDA device"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(4, 2, 64))


@pytest.mark.skipif(_C.cuda_is_built(), reason="this build has a CUDA backend")
def test_a_build_without_cuda_says_so():
    assert _C.cuda_device_count() == 0
    with pytest.raises(RuntimeError, match="this build of pyqemb has no CUDA kernels"):
        _C.largest_plan(1, 1, 1, 0)
