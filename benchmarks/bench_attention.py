"""varlen_attention against torch's scaled_dot_product_attention: dense, one sequence at a time, padded by 32."""

import pytest
import torch
import torch.nn.functional as F

from pyqemb import ops
from pyqemb.testing.cases import cu_seqlens, heavy_tailed

SHAPES = [(16, 8, 128), (8, 4, 64)]
TOKENS = 2048


def mix():
    lengths = heavy_tailed(64, median=100) + heavy_tailed(64, median=16, seed=1)
    return [lengths[i] for i in torch.randperm(128, generator=torch.Generator().manual_seed(0))]


def gflop(lengths, heads, dim, products):
    """2 n^2 D for each product and head: two products forward, five backward."""
    return 2 * products * sum(n * n for n in lengths) * heads * dim / 1e9


def with_gradients(function, *tensors):
    out = function(*tensors)
    return torch.autograd.grad(out, tensors, torch.ones_like(out))


def packed(lengths, shape, dtype=torch.float32):
    heads, kv_heads, dim = shape
    cu, tokens = cu_seqlens(lengths), sum(lengths)
    q, k, v = (torch.randn(tokens, n, dim, dtype=dtype).requires_grad_() for n in (heads, kv_heads, kv_heads))
    return lambda: with_gradients(lambda *x: ops.varlen_attention(*x, cu), q, k, v)


def sdpa(groups, shape, dtype=torch.float32):
    """One call for each group of lengths; a group of several lengths is padded to its longest, with a key mask."""
    heads, kv_heads, dim = shape
    inputs = []
    for group in groups:
        longest = max(group)
        mask = None
        if min(group) < longest:
            mask = (torch.arange(longest)[None] < torch.tensor(group)[:, None])[:, None, None]
        tensors = [
            torch.randn(len(group), n, longest, dim, dtype=dtype).requires_grad_() for n in (heads, kv_heads, kv_heads)
        ]
        inputs.append((tensors, mask))

    def run():
        for tensors, mask in inputs:
            with_gradients(
                lambda q, k, v, m=mask: F.scaled_dot_product_attention(q, k, v, attn_mask=m, enable_gqa=True), *tensors
            )

    return run


def named(shape, dtype):
    return f"{shape[0]}/{shape[1]} x {shape[2]} {str(dtype).removeprefix('torch.')}"


# torch's bfloat16 takes half a minute for a long case, so it has one shape and one round.
SHAPES_AND_TYPES = [(SHAPES[0], torch.float32), (SHAPES[1], torch.float32), (SHAPES[0], torch.bfloat16)]


@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_TYPES)
def test_heavy_tailed_mix(compare, shape, dtype):
    lengths = mix()
    compare(
        f"fwd+bwd, heavy-tailed, {named(shape, dtype)}",
        packed(lengths, shape, dtype),
        {
            "SDPA, padded by 32": sdpa([lengths[i : i + 32] for i in range(0, len(lengths), 32)], shape, dtype),
            "SDPA, one by one": sdpa([[n] for n in lengths], shape, dtype),
        },
        rounds=3 if dtype == torch.float32 else 1,
        gflop=gflop(lengths, shape[0], shape[2], 7),
    )


@pytest.mark.parametrize("length", [64, 128, 256, 512, 1024, 2048])
@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_TYPES)
def test_one_length(compare, shape, length, dtype):
    lengths = [length] * (TOKENS // length)
    compare(
        f"fwd+bwd, {length}, {named(shape, dtype)}",
        packed(lengths, shape, dtype),
        {"SDPA, dense": sdpa([lengths], shape, dtype)},
        rounds=9 if dtype == torch.float32 else 1,
        gflop=gflop(lengths, shape[0], shape[2], 7),
    )


@pytest.mark.parametrize("length", [512, 1024, 2048])
def test_forward(compare, length):
    """The share of the matrix-product ceiling is the figure to look at."""
    heads, kv_heads, dim = SHAPES[0]
    lengths = [length] * (2 * TOKENS // length)
    cu, tokens = cu_seqlens(lengths), sum(lengths)
    q, k, v = (torch.randn(tokens, n, dim) for n in (heads, kv_heads, kv_heads))
    q4, k4, v4 = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    compare(
        f"fwd, {length}, {named(SHAPES[0], torch.float32)}",
        lambda: ops.varlen_attention(q, k, v, cu),
        {"SDPA, dense": lambda: F.scaled_dot_product_attention(q4, k4, v4, enable_gqa=True)},
        rounds=15,
        gflop=gflop(lengths, heads, dim, 2),
    )
