"""The memory-bound ops of a Qwen3 layer, 8192 tokens of the 0.6B shape, against torch eager and torch.compile."""

import torch
import torch.nn.functional as F

from pyqemb import ops
from pyqemb.testing.cases import cu_seqlens, heavy_tailed

TOKENS, EMBED, FFN, HEADS, DIM = 8192, 1024, 3072, 16, 128


def gradients(function, tensors, dout):
    return torch.autograd.grad(function(*tensors), tensors, dout)


def against_torch(compare, name, ours, theirs, tensors, passes):
    """`passes`: times that an array of the first tensor's size must be read or written, forward and backward."""
    dout = torch.ones_like(tensors[0])
    compiled = torch.compile(theirs)
    compare(
        f"{name} fwd+bwd",
        lambda: gradients(ours, tensors, dout),
        {
            "torch eager": lambda: gradients(theirs, tensors, dout),
            "torch.compile": lambda: gradients(compiled, tensors, dout),
        },
        gbyte=passes * 4 * tensors[0].numel() / 1e9,
    )


def test_rms_norm(compare):
    tensors = torch.randn(TOKENS, EMBED, requires_grad=True), torch.ones(EMBED, requires_grad=True)

    def theirs(x, weight):
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    against_torch(compare, f"rms_norm, {TOKENS} x {EMBED}", ops.rms_norm, theirs, tensors, 5)


def test_swiglu(compare):
    gate, up = (torch.randn(TOKENS, FFN, requires_grad=True) for _ in range(2))
    against_torch(compare, f"swiglu, {TOKENS} x {FFN}", ops.swiglu, lambda g, u: F.silu(g) * u, (gate, up), 8)


def test_qk_norm_rope(compare):
    tensors = torch.randn(TOKENS, HEADS, DIM, requires_grad=True), torch.ones(DIM, requires_grad=True)
    angle = torch.arange(TOKENS)[:, None] * 1e6 ** (-torch.arange(DIM // 2) / (DIM // 2))
    cos, sin = angle.cos(), angle.sin()

    def theirs(x, weight):
        x = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        left, right = x.chunk(2, -1)
        wide_cos, wide_sin = torch.cat((cos, cos), -1)[:, None], torch.cat((sin, sin), -1)[:, None]
        return x * wide_cos + torch.cat((-right, left), -1) * wide_sin

    against_torch(
        compare, f"qk_norm_rope, {TOKENS} x {HEADS} x {DIM}", lambda x, w: ops.qk_norm_rope(x, w, cos, sin), theirs,
        tensors, 5,
    )  # fmt: skip


def test_last_token_pool(compare):
    lengths = heavy_tailed(1024, median=16)
    cu, weight = cu_seqlens(lengths), torch.ones(EMBED, requires_grad=True)
    hidden, dout = torch.randn(sum(lengths), EMBED, requires_grad=True), torch.ones(len(lengths), EMBED)
    ends = cu[1:].long() - 1

    def theirs(x, w):
        x = w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return F.normalize(x[ends], dim=-1)

    compare(
        f"last_token_pool with the final norm, {len(lengths)} of {sum(lengths)} tokens x {EMBED}, fwd+bwd",
        lambda: gradients(lambda x, w: ops.last_token_pool(x, cu, norm_weight=w), (hidden, weight), dout),
        {"torch eager": lambda: gradients(theirs, (hidden, weight), dout)},
        gbyte=4 * hidden.numel() / 1e9,
    )
