"""Every public function names the argument that it refuses, leaves its inputs as they were, and works at the next good
call.

A call is broken in one argument at a time, by every rule that fits what the argument is. What must be accepted is
listed too.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from pyqemb import ops
from pyqemb.data.batch import PackedBatch
from pyqemb.ops import Group
from pyqemb.training.grad_cache import GradCache

ERRORS = (TypeError, ValueError, IndexError)
HUGE = 10**400


class Flagged(Tensor):
    """A wrapper of a tensor: it has no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        raise NotImplementedError


# Rules: value -> broken values, or what is not to be had in place of a value.
def not_a_tensor(x: Any) -> Iterator[Any]:
    yield from (5, 0.5, "text", True, {}, object(), [1.0], np.zeros(3))


def wrong_memory(x: Tensor) -> Iterator[Any]:
    yield x.to("meta")
    yield Flagged(x)
    yield FakeTensorMode().from_tensor(x.detach())
    if x.dim() and not x.requires_grad:
        yield x.to_sparse()


def wrong_dtype(x: Tensor) -> Iterator[Any]:
    names = ("complex64", "bool", "int8", "uint8", "int16", "int32", "int64", "float64", "float8_e4m3fn")
    yield from (x.detach().to(getattr(torch, name)) for name in names if getattr(torch, name) != x.dtype)
    if x.is_floating_point():
        yield torch.quantize_per_tensor(x.detach().float(), 0.1, 0, torch.qint8)


def wrong_rank(x: Tensor) -> Iterator[Any]:
    yield x[None]
    yield x[..., None]
    yield torch.zeros((), dtype=x.dtype)
    if x.dim() > 1:
        yield x[0]
        yield x.flatten()


def sizes(*dims: int) -> Callable[[Tensor], Iterator[Any]]:
    """One more and one fewer in each of the dimensions that another argument fixes."""

    def rule(x: Tensor) -> Iterator[Any]:
        for dim in dims:
            yield torch.cat([x, x.narrow(dim, 0, 1)], dim)
            yield x.narrow(dim, 0, x.shape[dim] - 1)

    return rule


def values(*broken: Any) -> Callable[[Any], Iterator[Any]]:
    return lambda _: iter(broken)


def elements(*broken: float) -> Callable[[Tensor], Iterator[Any]]:
    def rule(x: Tensor) -> Iterator[Any]:
        for value in broken:
            for place in (0, x.numel() // 2, x.numel() - 1):
                wrong = x.detach().clone()
                wrong.view(-1)[place] = value
                yield wrong

    return rule


def lengths(x: Tensor) -> Iterator[Any]:
    yield from (x + 1, x[1:], x[:0], torch.cat([x, x[-1:] + 1]), torch.cat([x, x[:1]]), -x, x.flip(0), x.long(), x[:-1])


NUMBERS = ("0.1", None, [], {}, torch.zeros(2), np.zeros(2), True, 1j, HUGE, math.nan, object())
INTEGERS = ("1", 1.5, [], {}, torch.zeros(2), True, 1j, HUGE, math.nan, -1, -HUGE, object())
TENSOR = (not_a_tensor, wrong_memory, wrong_dtype, wrong_rank)
number = values(*NUMBERS, math.inf, -1.0)
flag = values("yes", None, 0, 1, 1.0, [], torch.ones(1))
text = values("other", 3, None, [], {}, True, b"mean")


@dataclass
class Op:
    """A call that works, and by argument the name in messages and the rules that break it."""

    call: Callable[..., Any]
    arguments: dict[str, Any]
    rules: dict[str, tuple[Callable[[Any], Iterator[Any]], ...]]
    positional: tuple[str, ...] = ()

    def __call__(self, **changes: Any) -> Any:
        given = {**self.arguments, **changes}
        positional = [given.pop(name) for name in self.positional]
        return self.call(*positional, **given)


def cu(*ends: int) -> Tensor:
    return torch.tensor([0, *ends], dtype=torch.int32)


def rows(count: int, size: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)), dim=1)


def heads(tokens: int, count: int, seed: int) -> Tensor:
    return torch.randn(tokens, count, 8, generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=2)
def catalogue(seed: int = 0) -> dict[str, Op]:
    """The calls, with the sizes and values of a seed."""
    r = Random(seed)
    n, m, e = (3, 5, 6) if seed == 0 else (r.randint(3, 6), r.randint(5, 9), 2 * r.randint(3, 6))  # queries, documents
    t, first = (4, 2) if seed == 0 else (r.randint(3, 6), r.randint(1, 3))  # tokens; of the first sequence
    torch.manual_seed(seed)
    q, d = rows(n, e, 2 * seed), rows(m, e, 2 * seed + 1)
    angle = torch.rand(t, 4)
    weight = torch.rand(e) + 0.5
    batch = PackedBatch.pack([[1, 2], [], [3]])
    scores, candidates = torch.rand(n), torch.arange(2 * n).view(n, 2) % m
    none = values(None)
    return {
        "varlen_attention": Op(
            ops.varlen_attention,
            dict(q=heads(m, 4, 0), k=heads(m, 2, 1), v=heads(m, 2, 2), cu_seqlens=cu(first, m), cu_seqlens_k=None,
                causal=False, scale=0.3, plan=None),
            dict(
                q=(*TENSOR, none, sizes(0, 1, 2)), k=(*TENSOR, none, sizes(0, 1, 2)), v=(*TENSOR, none, sizes(0, 1, 2)),
                cu_seqlens=(*TENSOR, none, lengths), cu_seqlens_k=(*TENSOR, lengths), causal=(flag,),
                scale=(values(*(x for x in NUMBERS if x is not None), math.inf),),
                plan=(values(5, "plan", {}, [], cu(5)),),
            ),
            ("q", "k", "v", "cu_seqlens"),
        ),
        "attention_plan": Op(
            ops.attention_plan,
            dict(cu_seqlens=cu(first, m), cu_seqlens_k=cu(first + 1, m - 1), tokens=m, tokens_k=m - 1, device="cpu"),
            dict(
                cu_seqlens=(*TENSOR, none, lengths), cu_seqlens_k=(*TENSOR, lengths),
                tokens=(values(*INTEGERS, m - 1, m + 1),), tokens_k=(values(*INTEGERS, m - 2, m),),
                device=(values("gpu?", "meta", 1.5, [], {}),),
            ),
            ("cu_seqlens", "cu_seqlens_k"),
        ),
        "info_nce": Op(
            ops.info_nce,
            dict(
                queries=q, documents=d, positive=torch.arange(n) % m,
                owner=torch.cat([torch.arange(m - 1) % n, torch.tensor([-1])]),
                document_ids=torch.arange(m), preset="qwen3", groups={"doc_own": Group()}, temperature=0.1, margin=0.1,
                doc_mask="own", softmax="joint", focal=0.5, matryoshka=[e, 3], matryoshka_weights=[1.0, 0.5],
                reduction="mean", rows=(0, 2), return_stats=False, tau_plus=0.1,
                more_positives=torch.tensor([[0, m - 1]]), guide=(rows(n, 3, 7), rows(m, 3, 8)), guide_margin=0.1,
                guide_relative=True,
            ),
            dict(
                queries=(*TENSOR, none, sizes(0, 1)), documents=(*TENSOR, none, sizes(0, 1)),
                positive=(*TENSOR, none, sizes(0), elements(-1, m, 2**40)),
                owner=(*TENSOR, sizes(0), elements(-2, n, 2**40)),
                document_ids=(*TENSOR, sizes(0)), preset=(text,),
                temperature=(number, values(0.0, torch.tensor(0.0), torch.tensor(1), torch.ones(2))),
                groups=(values(5, "all", [], [("doc_own", True)], {"doc": True}, {5: True}, {"doc_own": 0.1},
                    {"doc_own": "on"}),),
                margin=(values(*(x for x in NUMBERS if x is not None)),), doc_mask=(values("other", 3, [], {}, True),),
                softmax=(text,), focal=(number,), reduction=(text,), return_stats=(flag,),
                matryoshka=(values(5, "6", [], [0], [e + 1], [3, e, 2], [3, 3], [1.5, e], [True, e], ["3", e], [HUGE],
                    {}, [None, e], [-1, e]),),
                matryoshka_weights=(values(5, "6", [], [1.0], [1.0, -1.0], [1.0, math.nan], ["1", 2], [True, 1.0], {},
                    [None, 1], [HUGE, 1]),),
                rows=(values(5, "02", (0,), (0, 1, 2), (-1, 2), (0, n + 1), (n, 1), (0.0, 1), ("0", 1), (True, 1),
                    (0, HUGE), {}),),
                tau_plus=(number, values(-0.1, 1.0)),
                more_positives=(*TENSOR, sizes(1), elements(-1, 2**40)),
                guide=(values(5, "ab", [], [rows(n, 3)], (rows(n, 3), None), (rows(n, 3), rows(m, 2)), (rows(n + 1, 3),
                    rows(m, 3)), (rows(n, 3).long(), rows(m, 3)), {}),),
                guide_margin=(values(*NUMBERS),), guide_relative=(flag,),
            ),
            ("queries", "documents", "positive"),
        ),
        "last_token_pool": Op(
            ops.last_token_pool,
            dict(hidden=rows(m, e), cu_seqlens=cu(first, m), norm_weight=weight, eps=1e-6, dim=4, normalize=True),
            dict(
                hidden=(*TENSOR, none, sizes(0)), cu_seqlens=(*TENSOR, none, lengths), norm_weight=(*TENSOR, sizes(0)),
                eps=(number,), dim=(values(*INTEGERS, 0, e + 1),), normalize=(flag,),
            ),
            ("hidden", "cu_seqlens"),
        ),
        "rms_norm": Op(
            ops.rms_norm,
            dict(x=rows(t, e), weight=weight, eps=1e-6, residual=rows(t, e, 1)),
            dict(
                x=(*TENSOR, none, sizes(0, 1)), weight=(*TENSOR, none, sizes(0)), eps=(number,),
                residual=(*TENSOR, sizes(0, 1)),
            ),
            ("x", "weight"),
        ),
        "qk_norm_rope": Op(
            ops.qk_norm_rope,
            dict(x=heads(t, 2, 0), norm_weight=torch.ones(8), cos=angle.cos(), sin=angle.sin(), eps=1e-6),
            dict(
                x=(*TENSOR, none, sizes(0, 2)), norm_weight=(*TENSOR, none, sizes(0)), cos=(*TENSOR, none, sizes(0, 1)),
                sin=(*TENSOR, none, sizes(0, 1)), eps=(number,),
            ),
            ("x", "norm_weight", "cos", "sin"),
        ),
        "rope": Op(
            ops.rope,
            dict(x=heads(t, 2, 0), cos=angle.cos(), sin=angle.sin()),
            dict(x=(*TENSOR, none, sizes(0, 2)), cos=(*TENSOR, none, sizes(0, 1)), sin=(*TENSOR, none, sizes(0, 1))),
            ("x", "cos", "sin"),
        ),
        "swiglu": Op(
            ops.swiglu,
            dict(gate=rows(t, e), up=rows(t, e, 1)),
            dict(gate=(*TENSOR, none, sizes(0, 1)), up=(*TENSOR, none, sizes(0, 1))),
            ("gate", "up"),
        ),
        "linear": Op(
            ops.linear,
            dict(x=rows(t, e), weight=rows(n, e)),
            dict(x=(*TENSOR, none, sizes(1)), weight=(*TENSOR, none, sizes(1))),
            ("x", "weight"),
        ),
        "top_k": Op(
            ops.top_k,
            dict(queries=q, documents=d, k=2, exclude=torch.arange(-1, n - 1)[:, None], ceiling=torch.ones(n)),
            dict(
                queries=(*TENSOR, none, sizes(0, 1)), documents=(*TENSOR, none, sizes(1)),
                k=(values(*INTEGERS, m + 1),),
                exclude=(*TENSOR, sizes(0), elements(-2, m, 2**40)), ceiling=(*TENSOR, sizes(0), elements(math.nan)),
            ),
            ("queries", "documents", "k"),
        ),
        "shingles": Op(
            ops.shingles,
            dict(texts=["one two", ""], n=2),
            dict(texts=(values("one", b"one", None, 5, [1], [None], ["a", b"b"], {"a": 1}, {"a"}, torch.ones(2)),),
                n=(values(*INTEGERS, 0),)),
        ),
        "min_hash": Op(
            ops.min_hash,
            dict(texts=["one two", ""], num_hashes=4, n=2),
            dict(
                texts=(values("one", b"one", None, 5, [1], [None], ["a", b"b"], {"a": 1}, {"a"}, torch.ones(2)),),
                num_hashes=(values(*INTEGERS, 0),), n=(values(*INTEGERS, 0),),
            ),
        ),
        "cosent": Op(
            ops.cosent,
            dict(first=q, second=rows(n, e, 1), scores=scores, temperature=0.1),
            dict(
                first=(*TENSOR, none, sizes(0, 1)), second=(*TENSOR, none, sizes(0, 1)),
                scores=(not_a_tensor, wrong_memory, wrong_rank, none, sizes(0), elements(math.nan, math.inf)),
                temperature=(number, values(0.0)),
            ),
            ("first", "second", "scores"),
        ),
        "distill_scores": Op(
            ops.distill_scores,
            dict(queries=q, documents=d, candidates=candidates, teacher=torch.rand(n, 2),
                temperature=0.1, teacher_temperature=2.0, reduction="mean"),
            dict(
                queries=(*TENSOR, none, sizes(0, 1)), documents=(*TENSOR, none, sizes(1)),
                candidates=(*TENSOR, none, sizes(0, 1), elements(-2, m, 2**40)),
                teacher=(not_a_tensor, wrong_memory, wrong_rank, none, sizes(0, 1), elements(math.inf, math.nan)),
                temperature=(number, values(0.0)), teacher_temperature=(number, values(0.0)), reduction=(text,),
            ),
            ("queries", "documents", "candidates", "teacher"),
        ),
        "distill_embeddings": Op(
            ops.distill_embeddings,
            dict(student=q, teacher=rows(n, 8), projection=rows(8, e, 3), reduction="mean"),
            dict(
                student=(not_a_tensor, wrong_memory, wrong_rank, none, sizes(0, 1)),
                teacher=(not_a_tensor, wrong_memory, wrong_rank, none, sizes(0, 1), elements(math.nan, math.inf)),
                projection=(not_a_tensor, wrong_memory, wrong_rank, sizes(0, 1)), reduction=(text,),
            ),
            ("student", "teacher", "projection"),
        ),
        "yes_no": Op(
            ops.yes_no,
            dict(logits=rows(n, 2), labels=torch.arange(n) % 2, reduction="mean"),
            dict(
                logits=(not_a_tensor, wrong_memory, wrong_rank, none, sizes(0, 1)),
                labels=(not_a_tensor, wrong_memory, wrong_rank, none, sizes(0), elements(2, -1)), reduction=(text,),
            ),
            ("logits", "labels"),
        ),
        "Group": Op(
            Group,
            dict(mask="own", margin=0.1, relative=False, hardness=0.0),
            dict(
                mask=(values("other", 3, [], {}, True),),
                margin=(values(*(x for x in NUMBERS if x is not None), math.inf),),
                relative=(flag,), hardness=(values(*NUMBERS, math.inf),),
            ),
        ),
        "PackedBatch": Op(
            PackedBatch,
            dict(input_ids_T=batch.input_ids_T, positions_T=batch.positions_T, cu_seqlens=batch.cu_seqlens,
                max_seqlen=2, cu_seqlens_cpu=batch.cu_seqlens_cpu),
            dict(
                input_ids_T=(not_a_tensor, wrong_dtype, wrong_rank, none, sizes(0)),
                positions_T=(not_a_tensor, wrong_dtype, wrong_rank, none, sizes(0)),
                cu_seqlens=(not_a_tensor, wrong_dtype, wrong_rank, none),
                cu_seqlens_cpu=(not_a_tensor, wrong_dtype, wrong_rank, lengths),
                max_seqlen=(values(*INTEGERS[:9], None, 1),),
            ),
        ),
        "PackedBatch.pack": Op(PackedBatch.pack, dict(sequences=[[1, 2], []]),
            dict(sequences=(values(5, None, [1], [["a"]], [[1.5]], [[None]], [[2**63]], "ab"),))),
        "PackedBatch.split": Op(batch.split, dict(max_tokens=2),
            dict(max_tokens=(values(*(x for x in INTEGERS if x is not HUGE), 0),))),
        "PackedBatch.select": Op(batch.select, dict(indices=[0, 2]),
            dict(indices=(values([3], [-1], [1.5], ["0"], [True], [[0]], [None], [0, [1]], 5, None, "0", [2**70]),))),
        "PackedBatch.concat": Op(PackedBatch.concat, dict(batches=[batch, batch]),
            dict(batches=(values([], [5], [batch, None], "ab"),))),
        "PackedBatch.to": Op(batch.to, dict(device="cpu"), dict(device=(values("gpu?", 1.5, [], None),))),
        "GradCache": Op(
            GradCache,
            dict(model=torch.nn.Identity(), loss_fn=None, tokens_per_chunk=4, plan=None, memory=None, skip=0.0,
                parameters=None, ranks=None),
            dict(
                model=(values(None, 5, "model", {}),), loss_fn=(values(5, "loss", {}),),
                tokens_per_chunk=(values(*(x for x in INTEGERS if x is not HUGE), None, 0),),
                plan=(values(5, "plan", {}),), memory=(values("all", 0, -1, 1.5, True, [], {}),),
                skip=(number, values(1.0, 2)), parameters=(values(5, [5], ["a"], "ab"),),
                ranks=(values(5, "ranks", {}),),
            ),
        ),
    }  # fmt: skip


def printed(value: Any) -> Any:
    """Something to compare what a value holds by."""
    if (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and type(value) is Tensor
        and value.layout is torch.strided
    ):
        return zlib.crc32(value.detach().contiguous().view(torch.uint8).numpy().tobytes()) if value.numel() else 0
    return repr(value)


def broken_calls(op: Op) -> Iterator[tuple[str, Any]]:
    for name, rules in op.rules.items():
        for rule in rules:
            good = op.arguments[name]
            if good is None and rule in (wrong_memory, wrong_dtype, wrong_rank, lengths):
                good = op.arguments["cu_seqlens"]  # the only optional tensor that a call may leave out here
            if name == "cu_seqlens_k" and rule is lengths:
                yield from ((name, value) for value in rule(good) if not torch.equal(value, good))
                continue
            yield from ((name, value) for value in rule(good))


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, tuple | list):
        return all(map(same, first, second))
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    return True


@pytest.mark.promise("R17", "each argument of each op broken by every rule that fits it")
@pytest.mark.parametrize("name", catalogue())
def test_one_broken_argument_is_named(name):
    op = catalogue()[name]
    right = op()
    wrong, count = [], 0
    for argument, value in broken_calls(op):
        count += 1
        before = {key: printed(x) for key, x in op.arguments.items()}
        try:
            op(**{argument: value})
        except ERRORS as error:
            if not re.search(rf"\b{re.escape(argument)}\b", str(error)):
                wrong.append((argument, str(value)[:60], f"{type(error).__name__}: {error}"[:160]))
        except Exception as error:
            wrong.append((argument, str(value)[:60], f"{type(error).__name__}: {error}"[:160]))
        else:
            wrong.append((argument, getattr(value, "dtype", ""), str(value)[:60], "accepted"))
        assert before == {key: printed(x) for key, x in op.arguments.items()}
    assert not wrong, f"{len(wrong)} of {count}: " + "\n".join(map(str, wrong[:40]))
    assert count > 3
    assert same(op(), right)


def twins() -> dict[str, Callable[[], Any]]:
    """What looks unusual and is right."""
    q, d, at = rows(3, 6), rows(5, 6, 1), torch.arange(3)
    wide = torch.randn(3, 12)
    none = torch.zeros(1, dtype=torch.int32)
    return {
        "parameters": lambda: ops.rms_norm(torch.nn.Parameter(q), torch.nn.Parameter(torch.ones(6))),
        "strides": lambda: ops.last_token_pool(wide[:, ::2], cu(3)),
        "transposed": lambda: ops.info_nce(q.T.contiguous().T, d, at),
        "negative view": lambda: torch.testing.assert_close(ops.linear(torch._neg_view(q), d), ops.linear(-q, d)),
        "negative view of a kernel": lambda: torch.testing.assert_close(
            ops.swiglu(torch._neg_view(q), q), ops.swiglu(-q, q)
        ),
        "whole number as eps": lambda: ops.rms_norm(q, torch.ones(6), 0),
        "numpy numbers": lambda: ops.info_nce(
            q, d, at, temperature=np.float32(0.1), matryoshka=np.array([6, 3]).tolist()
        ),
        "numpy integer": lambda: ops.top_k(q, d, np.int64(2)),
        "temperature of one element": lambda: ops.info_nce(q, d, at, temperature=torch.ones(1, 1)),
        "no margin": lambda: ops.info_nce(q, d, at, margin=None),
        "infinite margin": lambda: ops.info_nce(q, d, at, margin=math.inf),
        "no rows": lambda: ops.info_nce(q, d, at, rows=(3, 0)),
        "rows as a list": lambda: ops.info_nce(q, d, at, rows=[0, 2]),
        "groups off": lambda: ops.info_nce(q, d, at, groups={"own_hard": None, "doc_own": False, "batch_hard": True}),
        "ceiling of infinity": lambda: ops.top_k(q, d, 1, ceiling=torch.full((3,), math.inf)),
        "no exclusions": lambda: ops.top_k(q, d, 1, exclude=torch.zeros(3, 0, dtype=torch.int64)),
        "no sequences": lambda: ops.last_token_pool(torch.zeros(0, 6), none),
        "a plan of nothing": lambda: ops.attention_plan(none),
        "attention of nothing": lambda: ops.varlen_attention(*3 * [torch.zeros(0, 2, 8)], none),
        "texts of an array": lambda: ops.shingles(np.array(["one two", ""])),
        "texts of a generator": lambda: ops.min_hash(text for text in ("one", "two")),
        "no texts": lambda: ops.shingles([]),
        "labels of bool": lambda: ops.yes_no(rows(2, 2), torch.tensor([True, False])),
        "scores of whole numbers": lambda: ops.cosent(q, q, torch.tensor([1, 2, 3])),
        "indices of a tensor": lambda: PackedBatch.pack([[1], [2]]).select(torch.tensor([1])),
        "a dropped empty selection": lambda: PackedBatch.pack([[1], [2]]).select([]),
    }


@pytest.mark.parametrize("name", twins())
def test_what_must_be_accepted(name):
    twins()[name]()
