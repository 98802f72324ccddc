"""varlen_attention, forward and backward: torch's varlen attention, its SDPA backends, FlexAttention, flash-attn if
there.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyqemb import ops
from pyqemb.testing.cases import cu_seqlens, heavy_tailed
from pyqemb.testing.device_bench import OURS, backward, forward

DTYPE = torch.bfloat16


def mix(tokens):
    """Short queries and long documents as they come, cut to the number of tokens."""
    lengths = [
        n for pair in zip(heavy_tailed(tokens, 16), heavy_tailed(tokens, 100, seed=1), strict=True) for n in pair
    ]
    chosen, total = [], 0
    for length in lengths:
        chosen.append(min(length, tokens - total))
        total += chosen[-1]
        if total == tokens:
            return chosen


def ours(cu, device, causal):
    plan = ops.attention_plan(cu, device=device)
    return lambda q, k, v: ops.varlen_attention(q, k, v, cu, causal=causal, plan=plan)


def torch_varlen(cu, cu_k, device, longest, longest_k, causal=False):
    from torch.nn.attention.varlen import varlen_attn

    cu, cu_k, window = cu.to(device), cu_k.to(device), (-1, 0 if causal else -1)
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def run(q, k, v):
        if grouped:
            return varlen_attn(q, k, v, cu, cu_k, longest, longest_k, window_size=window, enable_gqa=True)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        return varlen_attn(q, k, v, cu, cu_k, longest, longest_k, window_size=window)

    return run


def flash_attn(cu, device, causal, longest):
    from flash_attn import flash_attn_varlen_func

    cu = cu.to(device)
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=causal)


def sdpa(backend, length, causal):
    """All sequences of one length: the packed tensors are the dense ones."""

    def run(q, k, v):
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        if backend == SDPBackend.EFFICIENT_ATTENTION:  # knows no grouped heads
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        with sdpa_kernel([backend]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).flatten(0, 1)

    return run


def sdpa_padded(lengths, device, causal):
    """The padded batch that other libraries make; putting the tokens there and back is part of it."""
    longest = max(lengths)
    filled = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    mask, places = filled[:, None, None].to(device), filled.flatten().nonzero()[:, 0].to(device)
    if causal:
        mask = mask & torch.ones(longest, longest, dtype=torch.bool, device=device).tril()

    def run(q, k, v):
        q, k, v = (
            x.new_zeros(len(lengths) * longest, *x.shape[1:])
            .index_copy(0, places, x)
            .unflatten(0, (-1, longest))
            .transpose(1, 2)
            for x in (q, k, v)
        )
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, places)

    return run


def flex(lengths, device, causal, compiled):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)

    def same_sequence(batch, head, query, key):
        same = owner[query] == owner[key]
        return same & (query >= key) if causal else same

    mask = create_block_mask(same_sequence, None, None, len(owner), len(owner), device=device)
    attend = compiled(flex_attention, dynamic=False)

    def run(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return attend(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return run


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("length", [64, 128, 256, 512, 1024, 2048, None], ids=str)
def test_attention(measure, device, sizes, compiled, length, causal):
    if length is None:
        lengths = mix(sizes.tokens)
    else:
        if length > sizes.tokens:
            pytest.skip("longer than a tiny batch")
        lengths = [length] * (sizes.tokens // length)
    tokens, longest, cu = sum(lengths), max(lengths), cu_seqlens(lengths)
    tensors = [
        torch.randn(tokens, n, sizes.head_dim, device=device).to(DTYPE).requires_grad_()
        for n in (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    ]
    functions = {
        OURS: lambda: ours(cu, device, causal),
        "torch varlen_attn": lambda: torch_varlen(cu, cu, device, longest, longest, causal),
        "FlexAttention": lambda: flex(lengths, device, causal, compiled),
        "flash-attn": lambda: flash_attn(cu, device, causal, longest),
    }
    if length is None:
        functions["SDPA, padded"] = lambda: sdpa_padded(lengths, device, causal)
    else:
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            functions[f"SDPA {backend.name.lower()}"] = lambda backend=backend: sdpa(backend, length, causal)
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    gflop = 2 * pairs * sizes.heads * sizes.head_dim / 1e9  # of one product
    gbyte = tokens * 2 * (sizes.heads + sizes.kv_heads) * sizes.head_dim * DTYPE.itemsize / 1e9  # q, k, v, out once
    name = f"{'mix' if length is None else length}, {'causal' if causal else 'full'}"
    measure(f"{name}, forward", forward(functions, tensors), dtype=DTYPE, gflop=2 * gflop, gbyte=gbyte)
    measure(f"{name}, backward", backward(functions, tensors), dtype=DTYPE, gflop=5 * gflop, gbyte=2 * gbyte)


@pytest.mark.parametrize("length", [64, 512, 2048])
def test_one_query_a_sequence(measure, device, sizes, length):
    """The last layer: only the last token of each sequence asks."""
    if length > sizes.tokens:
        pytest.skip("longer than a tiny batch")
    count = sizes.tokens // length
    cu, cu_k = cu_seqlens([1] * count), cu_seqlens([length] * count)
    tensors = [
        torch.randn(rows, n, sizes.head_dim, device=device).to(DTYPE).requires_grad_()
        for rows, n in ((count, sizes.heads), (count * length, sizes.kv_heads), (count * length, sizes.kv_heads))
    ]

    def ours_last():
        plan = ops.attention_plan(cu, cu_k, device=device)
        return lambda q, k, v: ops.varlen_attention(q, k, v, cu, cu_seqlens_k=cu_k, plan=plan)

    functions = {OURS: ours_last, "torch varlen_attn": lambda: torch_varlen(cu, cu_k, device, 1, length)}
    keys = 2 * count * length * sizes.kv_heads * sizes.head_dim * DTYPE.itemsize / 1e9
    measure(f"one query, {length} keys, forward", forward(functions, tensors), dtype=DTYPE, gbyte=keys)
    measure(f"one query, {length} keys, backward", backward(functions, tensors), dtype=DTYPE, gbyte=2 * keys)
