"""The native CPU ops against the same formula in torch. Ratios above 1: the peer takes that many times as long."""

import pytest
import torch
import torch.nn.functional as F

from pyqemb import ops
from pyqemb.testing import reference
from pyqemb.testing.cases import cu_seqlens, heavy_tailed

HEADS = [(16, 8, 128), (8, 4, 64)]


def with_gradients(function, *tensors):
    out = function(*tensors)
    return torch.autograd.grad(out, tensors, torch.ones_like(out))


def packed_attention(lengths, heads, kv_heads, dim):
    cu, tokens = cu_seqlens(lengths), sum(lengths)
    q, k, v = (torch.randn(tokens, n, dim, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    return lambda: with_gradients(lambda *x: ops.varlen_attention(*x, cu), q, k, v)


def padded_attention(lengths, heads, kv_heads, dim, batch=32):
    """torch SDPA on batches of 32 as they come, padded to their longest, with a key mask."""
    groups = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
    inputs = []
    for group in groups:
        longest = max(group)
        shape = [(len(group), n, longest, dim) for n in (heads, kv_heads, kv_heads)]
        mask = (torch.arange(longest)[None] < torch.tensor(group)[:, None])[:, None, None]
        inputs.append(([torch.randn(s, requires_grad=True) for s in shape], mask))

    def run():
        for tensors, mask in inputs:
            with_gradients(
                lambda q, k, v, m=mask: F.scaled_dot_product_attention(q, k, v, attn_mask=m, enable_gqa=True), *tensors
            )

    return run


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_attention_on_the_heavy_tailed_mix(compare, heads, kv_heads, dim):
    lengths = heavy_tailed(64, median=100) + heavy_tailed(64, median=16, seed=1)
    lengths = [lengths[i] for i in torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    gflop = 14 * sum(n * n for n in lengths) * heads * dim / 1e9
    compare(
        f"attention fwd+bwd, heavy-tailed, {heads}/{kv_heads}x{dim}", "torch SDPA, padded by 32",
        packed_attention(lengths, heads, kv_heads, dim), padded_attention(lengths, heads, kv_heads, dim), 5, gflop,
    )  # fmt: skip


@pytest.mark.parametrize("length", [64, 256, 1024])
def test_attention_at_one_length(compare, length):
    lengths, (heads, kv_heads, dim) = [length] * (4096 // length), HEADS[0]
    q, k, v = (torch.randn(len(lengths), n, length, dim, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    gflop = 14 * sum(n * n for n in lengths) * heads * dim / 1e9
    compare(
        f"attention fwd+bwd, length {length}, {heads}/{kv_heads}x{dim}", "torch SDPA, dense",
        packed_attention(lengths, heads, kv_heads, dim),
        lambda: with_gradients(lambda *x: F.scaled_dot_product_attention(*x, enable_gqa=True), q, k, v), 5, gflop,
    )  # fmt: skip


@pytest.mark.parametrize(("count", "dim"), [(1024, 256), (2048, 1024)])
def test_info_nce(compare, count, dim):
    queries, documents = (F.normalize(torch.randn(count, dim), dim=1).requires_grad_() for _ in range(2))
    positive = torch.arange(count)
    compare(
        f"info_nce fwd+bwd, qwen3, N = M = {count}, d = {dim}", "naive torch",
        lambda: with_gradients(lambda q, d: ops.info_nce(q, d, positive, owner=positive), queries, documents),
        lambda: with_gradients(lambda q, d: reference.info_nce(q, d, positive, positive), queries, documents),
        3, 18 * count * count * dim / 1e9,
    )  # fmt: skip


TOKENS, EMBED, FFN = 4096, 1024, 3072


def test_rms_norm(compare):
    x, weight = torch.randn(TOKENS, EMBED, requires_grad=True), torch.ones(EMBED, requires_grad=True)
    compare(
        "rms_norm fwd+bwd, 4096 x 1024", "torch.nn.functional",
        lambda: with_gradients(ops.rms_norm, x, weight),
        lambda: with_gradients(lambda a, w: F.rms_norm(a, (EMBED,), w, 1e-6), x, weight),
    )  # fmt: skip


def test_swiglu(compare):
    gate, up = (torch.randn(TOKENS, FFN, requires_grad=True) for _ in range(2))
    compare(
        "swiglu fwd+bwd, 4096 x 3072", "torch eager",
        lambda: with_gradients(ops.swiglu, gate, up),
        lambda: with_gradients(lambda g, u: F.silu(g) * u, gate, up),
    )  # fmt: skip


def test_qk_norm_rope(compare):
    heads, dim = 16, 128
    q, head_weight = torch.randn(TOKENS, heads, dim, requires_grad=True), torch.ones(dim, requires_grad=True)
    angle = torch.arange(TOKENS)[:, None] * 0.5 ** torch.arange(dim // 2)
    cos, sin = angle.cos(), angle.sin()
    compare(
        "qk_norm_rope fwd+bwd, 4096 x 16 x 128", "torch eager",
        lambda: with_gradients(lambda a, w: ops.qk_norm_rope(a, w, cos, sin), q, head_weight),
        lambda: with_gradients(lambda a, w: reference.qk_norm_rope(a, w, cos, sin), q, head_weight),
    )  # fmt: skip


def test_top_k(compare):
    queries, documents = torch.randn(1000, 256), torch.randn(20000, 256)
    compare(
        "top_k, 1000 x 20000, d = 256, k = 50", "torch matmul + topk",
        lambda: ops.top_k(queries, documents, 50), lambda: (queries @ documents.T).topk(50), 5,
        2 * 1000 * 20000 * 256 / 1e9,
    )  # fmt: skip
