"""Prints digests of what the ops of pyqemb give on each of the numbers of threads in argv: forward and backward, sizes
that several threads share.
"""

import hashlib
import sys

import torch
from torch.nn.functional import normalize

from pyqemb import _C, ops
from pyqemb.testing.cases import cu_seqlens

GENERATOR = torch.Generator().manual_seed(0)
LENGTHS = (300, 1, 0, 700, 33, 129, 64)
TOKENS = sum(LENGTHS)


def random(*shape):
    return torch.randn(shape, generator=GENERATOR)


def unit(*shape):
    return normalize(random(*shape), dim=1)


CU = cu_seqlens(LENGTHS)
ANGLE = torch.rand(TOKENS, 16, generator=GENERATOR) * 6
POSITIVE, OWNER = torch.arange(300), torch.arange(1300) % 300
CALLS = {
    "attention": (lambda *x: ops.varlen_attention(*x, CU), [random(TOKENS, n, 32) for n in (4, 2, 2)]),
    "causal attention": (
        lambda *x: ops.varlen_attention(*x, CU, causal=True),
        [random(TOKENS, n, 32) for n in (4, 2, 2)],
    ),
    "pooling": (
        lambda h, w: ops.last_token_pool(h, cu_seqlens([2] * 600), norm_weight=w),
        [random(1200, 256), random(256)],
    ),
    "norm": (ops.rms_norm, [random(3000, 96), random(96)]),
    "norm of a sum": (
        lambda x, r, w: torch.cat(ops.rms_norm(x, w, residual=r)),
        [random(3000, 96), random(3000, 96), random(96)],
    ),
    "rotary": (
        lambda x, w: ops.qk_norm_rope(x, w, ANGLE.cos(), ANGLE.sin()),
        [random(TOKENS, 4, 32), random(32)],
    ),
    "rotary alone": (lambda x: ops.rope(x, ANGLE.cos(), ANGLE.sin()), [random(TOKENS, 4, 32)]),
    "swiglu": (ops.swiglu, [random(2000, 257), random(2000, 257)]),
    "info_nce": (
        lambda q, d: ops.info_nce(q, d, POSITIVE, owner=OWNER, matryoshka=[64, 16], softmax="split", focal=1.0),
        [unit(300, 64), unit(1300, 64)],
    ),
}
SEARCH = unit(200, 64), unit(30_000, 64)


def main(threads):
    for count in threads:
        torch.set_num_threads(count)
        assert _C.num_threads() == count
        for dtype in (torch.float32, torch.bfloat16):
            for name, (op, tensors) in CALLS.items():
                leaves = [x.to(dtype).requires_grad_() for x in tensors]
                out = op(*leaves)
                weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
                print(count, dtype, name, digest(out, *torch.autograd.grad(out, leaves, weights)))
        print(count, "top_k", digest(*ops.top_k(*SEARCH, 20)))


def digest(*tensors):
    sha = hashlib.sha256()
    for x in tensors:
        sha.update(x.detach().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


if __name__ == "__main__":
    main([int(count) for count in sys.argv[1:]])
