"""Random calls of every differentiable op and loss, with the same in plain torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pyqemb import ops
from pyqemb.ops.common import arithmetic
from pyqemb.ops.groups import PRESETS
from pyqemb.testing import reference
from pyqemb.testing.cases import cu_seqlens


@dataclass(frozen=True)
class RandomCall:
    """A call: `ours(*tensors)` and `naive(*tensors)` give the same tensor up to rounding."""

    ours: Callable[..., Tensor]
    naive: Callable[..., Tensor]
    tensors: Sequence[Tensor]  # inputs that may get a gradient, rounded to `dtype`
    dtype: torch.dtype
    about: str

    def results(self, function: Callable[..., Tensor], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        """The output in `dtype` and the gradient of each input, for a random gradient of the output."""
        leaves = [x.detach().to(dtype).requires_grad_() for x in self.tensors]
        out = function(*leaves)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


class Draw:
    """Random sizes and tensors, a function of the seed alone; `small`: sizes for finite differences."""

    def __init__(self, seed: int, dtype: torch.dtype, small: bool = False):
        self.generator, self.dtype, self.small = torch.Generator().manual_seed(seed), dtype, small

    def size(self, low: int, high: int, high_if_small: int) -> int:
        """From `low` to `high`, both included."""
        high = high_if_small if self.small else high
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def one_of(self, *choices: Any) -> Any:
        """One of the values."""
        return choices[self.size(0, len(choices) - 1, len(choices) - 1)]

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values of the dtype."""
        return (torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale).to(self.dtype)

    def unit(self, *shape: int) -> Tensor:
        """Unit rows of the dtype."""
        return normalize(torch.randn(shape, generator=self.generator, dtype=torch.float64), dim=1).to(self.dtype)

    def weight(self, size: int) -> Tensor:
        """The weight of a norm."""
        return (torch.rand(size, generator=self.generator, dtype=torch.float64) + 0.5).to(self.dtype)

    def lengths(self) -> list[int]:
        """Sequences of 0, 1 and more tokens."""
        longest = self.one_of(1, 9, 70, 300) if not self.small else self.one_of(1, 4)
        count = self.size(1, 7, 3)
        return [self.size(0, longest, longest) if self.size(0, 4, 4) else self.one_of(0, 1) for _ in range(count)]


def _attention(draw: Draw) -> RandomCall:
    lengths = draw.lengths()
    keys = [draw.size(1, 90, 4) if n else 0 for n in lengths] if draw.one_of(0, 0, 1) else lengths
    kv_heads, group = draw.size(1, 3, 2), draw.one_of(1, 2, 4) if not draw.small else draw.one_of(1, 2)
    head_dim, causal = 8 * draw.size(1, 17, 1), draw.one_of(False, True)
    cu, cu_k = cu_seqlens(lengths), cu_seqlens(keys)
    return RandomCall(
        lambda q, k, v: ops.varlen_attention(q, k, v, cu, cu_seqlens_k=cu_k, causal=causal),
        lambda q, k, v: reference.attention(q, k, v, cu, cu_k, causal=causal),
        [
            draw.normal(sum(lengths), kv_heads * group, head_dim),
            draw.normal(sum(keys), kv_heads, head_dim),
            draw.normal(sum(keys), kv_heads, head_dim),
        ],
        draw.dtype,
        f"lengths {lengths} over {keys}, heads {group} x {kv_heads} of {head_dim}, causal {causal}",
    )


def _pool(draw: Draw) -> RandomCall:
    lengths, embed = draw.lengths(), draw.size(1, 200, 6)
    dim, unit, with_norm = draw.one_of(None, draw.size(1, embed, embed)), draw.one_of(True, False), draw.one_of(0, 1)
    cu = cu_seqlens(lengths)

    def naive(hidden: Tensor, *weight: Tensor) -> Tensor:
        pooled = reference.pool(hidden, cu, weight[0] if weight else None, dim=dim, normalize=unit)
        return pooled + 0 * sum(x.sum() for x in (hidden, *weight))  # the inputs matter even if no sequence has tokens

    return RandomCall(
        lambda h, *w: ops.last_token_pool(h, cu, norm_weight=w[0] if w else None, dim=dim, normalize=unit),
        naive,
        [draw.normal(sum(lengths), embed, scale=draw.one_of(1, 30)), *([draw.weight(embed)] if with_norm else [])],
        draw.dtype,
        f"lengths {lengths}, embed {embed}, dim {dim}, norm {with_norm}, normalize {unit}",
    )


def _rms_norm(draw: Draw) -> RandomCall:
    shape = draw.size(1, 300, 3), draw.size(1, 300, 6)
    return RandomCall(
        ops.rms_norm, reference.rms_norm, [draw.normal(*shape), draw.weight(shape[1])], draw.dtype, f"{shape}"
    )


def _add_rms_norm(draw: Draw) -> RandomCall:
    shape = draw.size(1, 300, 3), draw.size(1, 300, 6)

    def naive(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return torch.stack((reference.rms_norm(x + residual, weight), x + residual))

    return RandomCall(
        lambda x, w, r: torch.stack([*ops.rms_norm(x, w, residual=r)]),
        naive,
        [draw.normal(*shape), draw.weight(shape[1]), draw.normal(*shape)],
        draw.dtype,
        f"{shape}",
    )


def _rotary(draw: Draw, normed: bool) -> RandomCall:
    tokens, heads, half = draw.size(1, 200, 3), draw.size(1, 6, 2), draw.size(1, 70, 3)
    angle = torch.rand(tokens, half, generator=draw.generator, dtype=torch.float64) * 6
    cos, sin = (x.to(arithmetic(draw.dtype)) for x in (angle.cos(), angle.sin()))
    x, about = draw.normal(tokens, heads, 2 * half), f"{tokens} tokens, {heads} heads of {2 * half}"
    if not normed:
        return RandomCall(
            lambda x: ops.rope(x, cos, sin), lambda x: reference.rope(x, cos, sin), [x], draw.dtype, about
        )
    return RandomCall(
        lambda x, w: ops.qk_norm_rope(x, w, cos, sin),
        lambda x, w: reference.qk_norm_rope(x, w, cos, sin),
        [x, draw.weight(2 * half)],
        draw.dtype,
        about,
    )


def _swiglu(draw: Draw) -> RandomCall:
    shape = draw.size(1, 200, 3), draw.size(1, 300, 5)
    return RandomCall(
        ops.swiglu, reference.swiglu, [draw.normal(*shape, scale=3), draw.normal(*shape)], draw.dtype, f"{shape}"
    )


def _linear(draw: Draw) -> RandomCall:
    tokens, inputs, outputs = draw.size(1, 200, 3), draw.size(1, 200, 4), draw.size(1, 200, 3)
    return RandomCall(
        ops.linear,
        torch.nn.functional.linear,
        [draw.normal(tokens, inputs), draw.normal(outputs, inputs)],
        draw.dtype,
        f"{tokens} x {inputs} x {outputs}",
    )


def _info_nce(draw: Draw) -> RandomCall:
    queries, documents, dim = draw.size(1, 90, 4), draw.size(1, 300, 9), draw.size(3, 150, 5)
    generator = draw.generator
    vectors = draw.unit(documents, dim)
    positive = torch.randint(0, documents, (queries,), generator=generator)
    near = normalize(vectors[positive].double() + 0.7 * draw.unit(queries, dim).double(), dim=1).to(draw.dtype)
    owner = torch.randint(-1, queries, (documents,), generator=generator)
    owner[positive] = torch.arange(queries)
    ids = torch.randint(0, documents * 4, (documents,), generator=generator)
    preset, softmax = draw.one_of(*PRESETS), draw.one_of("joint", "split")
    focal, temperature = draw.one_of(0.0, 1.5), draw.one_of(0.2, 0.1, 0.05)
    margin = draw.one_of(0.1, None, 0.5)

    def ours(q: Tensor, d: Tensor) -> Tensor:
        return ops.info_nce(
            q, d, positive, owner=owner, document_ids=ids, preset=preset, softmax=softmax, focal=focal,
            temperature=temperature, margin=margin,
        )  # fmt: skip

    def naive(q: Tensor, d: Tensor) -> Tensor:
        return reference.info_nce(
            q, d, positive, owner=owner, document_ids=ids, temperature=temperature, margin=margin,
            groups=PRESETS[preset], split=softmax == "split", focal=focal,
        )  # fmt: skip

    about = f"{queries} queries, {documents} documents of {dim}, {preset}, {softmax}, focal {focal}, tau {temperature}"
    return RandomCall(ours, naive, [near, vectors], draw.dtype, about)


def _cosent(draw: Draw) -> RandomCall:
    rows, dim = draw.size(2, 60, 4), draw.size(2, 100, 5)
    scores = torch.rand(rows, generator=draw.generator)
    higher = scores[:, None] > scores[None, :]

    def naive(first: Tensor, second: Tensor) -> Tensor:
        cosine = (first * second).sum(1) / 0.1
        gaps = (cosine[None, :] - cosine[:, None])[higher]
        return torch.logsumexp(torch.cat([gaps.new_zeros(1), gaps]), 0)

    return RandomCall(
        lambda a, b: ops.cosent(a, b, scores, temperature=0.1),
        naive,
        [draw.unit(rows, dim), draw.unit(rows, dim)],
        draw.dtype,
        f"{rows} rows of {dim}",
    )


def _distill_scores(draw: Draw) -> RandomCall:
    queries, documents, dim = draw.size(1, 40, 3), draw.size(2, 90, 5), draw.size(2, 80, 5)
    count = draw.size(1, min(documents, 8), 2)
    candidates = torch.stack([torch.randperm(documents, generator=draw.generator)[:count] for _ in range(queries)])
    teacher = torch.rand(queries, count, generator=draw.generator)

    def naive(q: Tensor, d: Tensor) -> Tensor:
        logits = (q[:, None] * d[candidates]).sum(2) / 0.1
        return -(teacher.to(q.dtype).softmax(1) * logits.log_softmax(1)).sum(1).mean()

    return RandomCall(
        lambda q, d: ops.distill_scores(q, d, candidates, teacher, temperature=0.1),
        naive,
        [draw.unit(queries, dim), draw.unit(documents, dim)],
        draw.dtype,
        f"{queries} queries, {documents} documents of {dim}, {count} candidates",
    )


def _distill_embeddings(draw: Draw) -> RandomCall:
    rows, dim, wide = draw.size(1, 60, 3), draw.size(2, 50, 4), draw.size(2, 70, 5)
    teacher = draw.normal(rows, wide).float() * 3

    def naive(student: Tensor, projection: Tensor) -> Tensor:
        return (1 - torch.cosine_similarity(student @ projection.T, teacher.to(student.dtype), dim=1)).mean()

    return RandomCall(
        lambda s, p: ops.distill_embeddings(s, teacher, p),
        naive,
        [draw.unit(rows, dim), draw.normal(wide, dim)],
        draw.dtype,
        f"{rows} rows, {dim} to {wide}",
    )


def _yes_no(draw: Draw) -> RandomCall:
    rows = draw.size(1, 60, 4)
    labels = torch.randint(0, 2, (rows,), generator=draw.generator)

    def naive(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, 1 - labels)

    return RandomCall(
        lambda x: ops.yes_no(x, labels), naive, [draw.normal(rows, 2, scale=3)], draw.dtype, f"{rows} rows"
    )


_MAKERS: dict[str, Callable[[Draw], RandomCall]] = {
    "varlen_attention": _attention,
    "last_token_pool": _pool,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "qk_norm_rope": lambda draw: _rotary(draw, True),
    "rope": lambda draw: _rotary(draw, False),
    "swiglu": _swiglu,
    "linear": _linear,
    "info_nce": _info_nce,
    "cosent": _cosent,
    "distill_scores": _distill_scores,
    "distill_embeddings": _distill_embeddings,
    "yes_no": _yes_no,
}
OPS = tuple(_MAKERS)


def random_call(op: str, seed: int, dtype: torch.dtype = torch.float32, small: bool = False) -> RandomCall:
    """The call number `seed` of an op; `small`: few enough values for finite differences."""
    return _MAKERS[op](Draw(1000 * OPS.index(op) + seed, dtype, small))
