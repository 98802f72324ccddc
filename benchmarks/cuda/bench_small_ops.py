"""The memory-bound ops of a Qwen3 layer, forward and backward, against torch eager and torch.compile."""

import torch
import torch.nn.functional as F

from pyqemb import ops
from pyqemb.testing.cases import cu_seqlens
from pyqemb.testing.device_bench import OURS, backward, forward

DTYPE, EPS = torch.bfloat16, 1e-6


def against_torch(measure, compiled, name, ours, theirs, tensors, passes):
    """`passes`: how many arrays of the first tensor's size must be read or written, forward and backward."""
    functions = {OURS: lambda: ours, "torch eager": lambda: theirs, "torch.compile": lambda: compiled(theirs)}
    size = tensors[0].numel() * DTYPE.itemsize / 1e9
    measure(f"{name}, forward", forward(functions, tensors), dtype=DTYPE, gbyte=passes[0] * size)
    measure(f"{name}, backward", backward(functions, tensors), dtype=DTYPE, gbyte=passes[1] * size)


def normal(device, *shape):
    return torch.randn(*shape, device=device).to(DTYPE).requires_grad_()


def norm(x, weight):
    """As transformers writes it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def test_rms_norm(measure, device, sizes, compiled):
    tensors = normal(device, sizes.tokens, sizes.hidden), normal(device, sizes.hidden)
    name = f"rms_norm, {sizes.tokens} x {sizes.hidden}"
    against_torch(measure, compiled, name, lambda x, w: ops.rms_norm(x, w, EPS), norm, tensors, (2, 3))


def test_rms_norm_with_residual(measure, device, sizes, compiled):
    tensors = *(normal(device, sizes.tokens, sizes.hidden) for _ in range(2)), normal(device, sizes.hidden)

    def theirs(x, residual, weight):
        total = x + residual
        return norm(total, weight), total

    def ours(x, residual, weight):
        return ops.rms_norm(x, weight, EPS, residual=residual)

    against_torch(
        measure, compiled, f"rms_norm + residual, {sizes.tokens} x {sizes.hidden}", ours, theirs, tensors, (4, 4)
    )


def test_swiglu(measure, device, sizes, compiled):
    tensors = [normal(device, sizes.tokens, sizes.intermediate) for _ in range(2)]
    name = f"swiglu, {sizes.tokens} x {sizes.intermediate}"
    against_torch(measure, compiled, name, ops.swiglu, lambda gate, up: F.silu(gate) * up, tensors, (3, 5))


def test_qk_norm_rope(measure, device, sizes, compiled):
    half = sizes.head_dim // 2
    tensors = normal(device, sizes.tokens, sizes.heads, sizes.head_dim), normal(device, sizes.head_dim)
    angles = torch.arange(sizes.tokens)[:, None] * 1e6 ** (-torch.arange(half) / half)
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    wide_cos, wide_sin = (torch.cat((x, x), -1)[:, None].to(DTYPE) for x in (cos, sin))

    def theirs(x, weight):
        x = norm(x, weight)
        left, right = x.chunk(2, -1)
        return x * wide_cos + torch.cat((-right, left), -1) * wide_sin

    against_torch(
        measure, compiled, f"qk_norm_rope, {sizes.tokens} x {sizes.heads} x {sizes.head_dim}",
        lambda x, w: ops.qk_norm_rope(x, w, cos, sin, EPS), theirs, tensors, (2, 3),
    )  # fmt: skip


def test_last_token_pool(measure, device, sizes, compiled):
    """Of a whole layer's output: the backward pass must write a gradient of zeros for all other tokens."""
    count = sizes.tokens // 32
    cu = cu_seqlens([32] * count)
    cu_device, ends = cu.to(device), (cu[1:].long() - 1).to(device)
    tensors = normal(device, sizes.tokens, sizes.hidden), normal(device, sizes.hidden)
    against_torch(
        measure, compiled, f"last_token_pool, {count} of {sizes.tokens} x {sizes.hidden}",
        lambda x, w: ops.last_token_pool(x, cu_device, norm_weight=w, eps=EPS),
        lambda x, w: F.normalize(norm(x.index_select(0, ends), w), dim=-1), tensors, (2 / 32, 1 + 1 / 32),
    )  # fmt: skip
