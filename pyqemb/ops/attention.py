"""Attention over packed sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyqemb import _C
from pyqemb.ops import checks
from pyqemb.ops.checks import tensor
from pyqemb.ops.common import at_kernels, differentiable, empty_like, native, new, new_rows

_OP = "varlen_attention"
_MOST_TOKENS = 2**31 - 1  # cu_seqlens is int32
_WIDE = torch.float32, torch.float64


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """The lengths of a batch, and the tiles in which the CUDA kernels process it. `attention_plan` makes one.

    Args:
        cu_seqlens: [B + 1] int32, cumulative lengths of the queries.
        cu_seqlens_k: [B + 1] int32, cumulative lengths of the keys.
        tokens: the number of query tokens, T.
        tokens_k: the number of key tokens, S.
        data: the tiles of the CUDA kernels (default: none, for the CPU).
        sizes: the sizes of the parts of `data`.
        host: both lengths on the CPU (default: none, if they came from a GPU).

    Example:
        >>> pyqemb.ops.attention_plan(torch.tensor([0, 2, 5], dtype=torch.int32)).tokens
        5
    """

    cu_seqlens: Tensor  # int32 [B + 1], where the kernels read it
    cu_seqlens_k: Tensor
    tokens: int
    tokens_k: int
    data: Tensor | None = None  # int32, the lists of csrc/ops/attention.h; None on the CPU
    # Capacities of its lists: tiles, blocks, key blocks, summed blocks; and 1 if no sequence has more than one query.
    sizes: Sequence[int] = (0, 0, 0, 0, 0)
    host: tuple[Tensor, Tensor] | None = None  # both lengths on the CPU, where they came from there


def attention_plan(
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    tokens: int | None = None,
    tokens_k: int | None = None,
    device: torch.device | str | None = None,
) -> AttentionPlan:
    """The plan of a batch for `varlen_attention(..., plan=...)`, made once instead of in every layer.

    Args:
        cu_seqlens: [B + 1] int32, as for varlen_attention. Preferably on the CPU, where the lengths are known: the plan
            is exact, and is checked and copied without waiting. On a GPU a kernel makes the plan, with capacity for any
            lengths.
        cu_seqlens_k: the same for the keys (default: queries and keys are the same tokens).
        tokens: the last value of cu_seqlens, T; required if cu_seqlens is on a GPU (default: read from it).
        tokens_k: the last value of cu_seqlens_k, S, likewise.
        device: the device of q, k and v (default: that of cu_seqlens).

    Returns:
        The plan, for all layers and both passes of the batch.

    Raises:
        TypeError, ValueError: invalid cu_seqlens; missing tokens.

    Example:
        >>> cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
        >>> plan = pyqemb.ops.attention_plan(cu_seqlens)
        >>> q_TND = torch.randn(5, 4, 16)
        >>> pyqemb.ops.varlen_attention(q_TND, q_TND, q_TND, None, plan=plan).shape
        torch.Size([5, 4, 16])
    """
    op = "attention_plan"
    cu_seqlens = _lengths_tensor(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens_k is not None:
        cu_seqlens_k = _lengths_tensor(op, "cu_seqlens_k", cu_seqlens_k)
        if len(cu_seqlens_k) != len(cu_seqlens):
            raise ValueError(
                f"[{op}] cu_seqlens and cu_seqlens_k must have as many entries, got {len(cu_seqlens)} and "
                f"{len(cu_seqlens_k)}"
            )
    elif tokens_k is not None:
        raise ValueError(f"[{op}] tokens_k must be None without cu_seqlens_k, got {tokens_k!r:.100}")
    target = cu_seqlens.device if device is None else checks.device(op, "device", device)
    if target.type not in ("cpu", "cuda") and not checks.has_no_values():
        raise ValueError(f"[{op}] device must be the CPU or a CUDA device, got {target}")
    count = _count(op, "tokens", tokens, cu_seqlens)
    count_k = count if cu_seqlens_k is None else _count(op, "tokens_k", tokens_k, cu_seqlens_k)
    for name, cu, total in (("cu_seqlens", cu_seqlens, count), ("cu_seqlens_k", cu_seqlens_k, count_k)):
        if cu is not None and cu.device.type == "cpu" and not checks.has_no_values():
            _C.check_cu_seqlens(op, name, cu.contiguous(), total, "q" if name == "cu_seqlens" else "k")
    return _make_plan(op, cu_seqlens, cu_seqlens_k, count, count_k, target)


def _lengths_tensor(op: str, name: str, value: Any) -> Tensor:
    cu = tensor(op, name, value)
    if cu.dim() != 1 or not len(cu):
        raise ValueError(
            f"[{op}] {name} must have shape [num_sequences + 1], with at least one entry, got {list(cu.shape)}"
        )
    if cu.dtype != torch.int32:
        raise TypeError(f"[{op}] {name} must be int32, got {cu.dtype}")
    return cu


def _count(op: str, name: str, count: Any, cu: Tensor) -> int:
    """The number of tokens: `count`, or the last value of cu_seqlens."""
    if count is not None:
        count = checks.integer(op, name, count, 0, _MOST_TOKENS)
        if cu.device.type == "cpu" and not checks.has_no_values() and count != int(cu[-1]):
            lengths = name.replace("tokens", "cu_seqlens")
            raise ValueError(f"[{op}] {name} must be the last value of {lengths}, {int(cu[-1])}, got {count}")
        return count
    if cu.device.type != "cpu":
        raise ValueError(f"[{op}] {name} must be given if cu_seqlens is on a GPU: reading it would make the host wait")
    return int(cu[-1])


def _make_plan(
    op: str, cu_q: Tensor, cu_k: Tensor | None, tokens: int, tokens_k: int, device: torch.device
) -> AttentionPlan:
    if device.type != "cuda" or checks.has_no_values():
        cu_q, cu_k = _lengths(op, cu_q, cu_k, tokens, tokens_k, device)
        return AttentionPlan(cu_q, cu_k, tokens, tokens_k)
    if cu_q.device.type == "cpu" and (cu_k is None or cu_k.device.type == "cpu"):
        return _plan_on_host(
            op, cu_q.contiguous(), None if cu_k is None else cu_k.contiguous(), tokens, tokens_k, device
        )
    return _plan_on_device(*_lengths(op, cu_q, cu_k, tokens, tokens_k, device), tokens, tokens_k)


def _lengths(
    op: str, cu_q: Tensor, cu_k: Tensor | None, tokens: int, tokens_k: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    cu_q = at_kernels(op, "cu_seqlens", cu_q, tokens, "q", device)
    return cu_q, cu_q if cu_k is None else at_kernels(op, "cu_seqlens_k", cu_k, tokens_k, "k", device)


def _plan_on_host(
    op: str, cu_q: Tensor, cu_k: Tensor | None, tokens: int, tokens_k: int, device: torch.device
) -> AttentionPlan:
    """The plan and the lengths, sent in one asynchronous copy."""
    _C.check_cu_seqlens(op, "cu_seqlens", cu_q, tokens, "q")
    _C.check_cu_seqlens(op, "cu_seqlens_k", cu_q if cu_k is None else cu_k, tokens_k, "k")
    lengths = [cu_q] if cu_k is None else [cu_q, cu_k]
    index = torch.cuda.current_device() if device.index is None else device.index
    sizes = _C.size_plan(lengths[0], lengths[-1], index)
    parts = [_data_size(sizes), *map(len, lengths)]
    packed = torch.empty(sum(parts), dtype=torch.int32, pin_memory=True)
    data, *copies = packed.split(parts)
    _C.fill_plan(lengths[0], lengths[-1], index, sizes, data)
    for copy, cu in zip(copies, lengths, strict=True):
        copy.copy_(cu)
    data, *cu = packed.to(device, non_blocking=True).split(parts)
    return AttentionPlan(cu[0], cu[-1], tokens, tokens_k, data, sizes, (lengths[0], lengths[-1]))


def _plan_on_device(cu_q: Tensor, cu_k: Tensor, tokens: int, tokens_k: int) -> AttentionPlan:
    sizes = _C.largest_plan(cu_q.numel() - 1, tokens, tokens_k, cu_q.device.index)
    parts = [_data_size(sizes), len(cu_q), len(cu_k)]
    data, checked_q, checked_k = cu_q.new_empty(sum(parts)).split(parts)
    _C.fill_plan_on_device(cu_q, cu_k, tokens, tokens_k, sizes, data, checked_q, checked_k)
    return AttentionPlan(checked_q, checked_k, tokens, tokens_k, data, sizes)


def _data_size(sizes: Sequence[int]) -> int:
    return 5 + 2 * sum(sizes[:2]) + 3 * sizes[2]


def varlen_attention(
    q_TND: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    cu_seqlens: Tensor | None,
    *,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """softmax(scale q k^T) v within each sequence of a packed batch, with grouped-query heads, differentiable once.

    Args:
        q_TND: [T, N, D] float32, bfloat16, float16 or float64, D a multiple of 8 up to 256. On CUDA, bfloat16 and
            float16 have kernels for D 64 and 128, and torch computes float32 and float64, one sequence after another.
            D is contiguous; tokens and heads may be strided (slices of one qkv projection).
        k_SKD: [S, K, D] of the same dtype; N a multiple of K, query head n reads key head n // (N // K).
        v_SKD: [S, K, D] of the same dtype.
        cu_seqlens: [B + 1] int32, `[0, ..., T]`, where each sequence starts. Values that are on a GPU already are
            checked there: where they are wrong, the result is NaN.
        cu_seqlens_k: the same for the keys, `[0, ..., S]`; None if queries and keys are the same tokens.
        causal: query i of n sees key j of m when j <= i + m - n (aligned to the bottom right). False: all keys.
        scale: 1 / sqrt(D) when None.
        plan: `attention_plan` of these cu_seqlens, which are then read from the plan (and may be None here). Without
            it, each call on CUDA computes its own plan; sharing one between layers saves host time.

    Returns:
        [T, N, D], dtype of q. Arithmetic is float32 (float64 for float64). A query without keys gives zeros. The result
        for a sequence is bitwise identical for any other content of the batch and any number of threads.

    Raises:
        TypeError: not a tensor, or of the wrong dtype. ValueError: incompatible shapes, head counts or cu_seqlens.

    Example:
        >>> q_TND, k_SKD, v_SKD = torch.randn(5, 4, 16), torch.randn(5, 2, 16), torch.randn(5, 2, 16)
        >>> cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
        >>> pyqemb.ops.varlen_attention(q_TND, k_SKD, v_SKD, cu_seqlens, causal=True).shape
        torch.Size([5, 4, 16])

    Source: Dao et al. 2022 (FlashAttention), algorithms 1 and 4; grouped heads, Ainslie et al. 2023.
    """
    if scale is None:  # a q without a head dimension raises below
        scale = q_TND.shape[-1] ** -0.5 if isinstance(q_TND, Tensor) and q_TND.dim() and q_TND.shape[-1] else 1.0
    scale, causal = checks.finite(_OP, "scale", scale), checks.flag(_OP, "causal", causal)
    q_TND, k_SKD, v_SKD = _last_contiguous("q", q_TND), _last_contiguous("k", k_SKD), _last_contiguous("v", v_SKD)
    tokens = q_TND.shape[0] if q_TND.dim() else 0  # len(x) takes four times as long
    tokens_k = k_SKD.shape[0] if k_SKD.dim() else 0
    if plan is None:
        cu_seqlens = tensor(_OP, "cu_seqlens", cu_seqlens)
        plan = _make_plan(_OP, cu_seqlens, cu_seqlens_k, tokens, tokens_k, q_TND.device)
    elif not isinstance(plan, AttentionPlan):
        raise TypeError(f"[{_OP}] plan must be an AttentionPlan, got {type(plan).__name__}")
    elif plan.tokens != tokens or plan.tokens_k != tokens_k:
        raise ValueError(
            f"[{_OP}] plan is for {plan.tokens} tokens of q and {plan.tokens_k} of k, got {tokens} and {tokens_k}"
        )
    checks.optional_tensor(_OP, "cu_seqlens", cu_seqlens)
    checks.optional_tensor(_OP, "cu_seqlens_k", cu_seqlens_k)
    if q_TND.is_cuda and q_TND.dtype in _WIDE and not checks.has_no_values():
        return by_sequence(q_TND, k_SKD, v_SKD, plan, causal=causal, scale=scale)
    cu = plan.cu_seqlens, plan.cu_seqlens_k
    return _attention(q_TND, k_SKD, v_SKD, *cu, plan.data, plan.sizes, scale, causal)


def by_sequence(
    q_TND: Tensor, k_SKD: Tensor, v_SKD: Tensor, plan: AttentionPlan, *, causal: bool, scale: float
) -> Tensor:
    """Attention by torch, one sequence after another: for float32 and float64 on CUDA, which have no kernel.

    It is for checks and small models: it costs a few launches a sequence, and the host waits for lengths that only the
    GPU knows.
    """
    lengths, lengths_k = (torch.diff(cu).tolist() for cu in plan.host or (plan.cu_seqlens, plan.cu_seqlens_k))
    parts = [q_TND[:0]]
    for q, k, v in zip(q_TND.split(lengths), k_SKD.split(lengths_k), v_SKD.split(lengths_k), strict=True):
        count, keys = len(q), len(k)
        blind = max(count - keys, 0) if causal else count * (keys == 0)  # queries at the start that see no key
        mask = None
        if causal and count != keys:
            mask = torch.ones(count - blind, keys, dtype=torch.bool, device=q.device).tril(keys - (count - blind))
        parts.append(q[:blind] * 0)
        if count > blind:
            a, b, c = (x.transpose(0, 1) for x in (q[blind:], k, v))
            out = torch.nn.functional.scaled_dot_product_attention(
                a, b, c, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=True
            )
            parts.append(out.transpose(0, 1))
    return torch.cat(parts)


@native(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor cu_seqlens_k, Tensor? plan, SymInt[] "
    "sizes, float scale, bool causal) -> (Tensor, Tensor)",
    lambda q, k, v, cu_q, cu_k, plan, sizes, scale, causal: (new(q), new_rows(q)),
)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, plan: Tensor | None, sizes: Sequence[int],
    scale: float, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = empty_like(q), new_rows(q)
    cu_q, cu_k, plan, sizes = _work(q, k, cu_q, cu_k, plan, sizes)
    _C.attention_forward(q, k, v, cu_q, cu_k, out=out, lse=lse, scale=scale, causal=causal, plan=plan, sizes=sizes)
    return out, lse


@native(
    "varlen_attention_backward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor cu_seqlens_k, Tensor? plan,"
    " SymInt[] sizes, float scale, bool causal, Tensor out, Tensor lse, Tensor dout)"
    " -> (Tensor, Tensor, Tensor)",
    lambda q, k, v, *_: (new(q), new(k), new(v)),
)
def _gradient(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, plan: Tensor | None, sizes: Sequence[int],
    scale: float, causal: bool, out: Tensor, lse: Tensor, dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (empty_like(x) for x in (q, k, v))
    cu_q, cu_k, plan, sizes = _work(q, k, cu_q, cu_k, plan, sizes)
    _C.attention_backward(
        q, k, v, cu_q, cu_k, out=out, lse=lse, dout=dout.contiguous(), dq=dq, dk=dk, dv=dv, scale=scale, causal=causal,
        plan=plan, sizes=sizes,
    )  # fmt: skip
    return dq, dk, dv


def _work(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, plan: Tensor | None, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor | None, Sequence[int]]:
    """Lengths and plan as the native code takes them; compiled graphs have no plan."""
    if plan is None and q.is_cuda:
        made = _plan_on_device(cu_q, cu_k, len(q), len(k))
        return made.cu_seqlens, made.cu_seqlens_k, made.data, made.sizes
    return cu_q, cu_k, plan, sizes


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.fixed = inputs[6:]


def _backward(gradient: Any, ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None
    *inputs, out, lse = ctx.saved_tensors
    return gradient(*inputs, *ctx.fixed, out, lse, dout)


_attention = differentiable("varlen_attention", _forward, _gradient, _keep, _backward, inputs=3)


def _last_contiguous(name: str, x: Any) -> Tensor:
    x = tensor(_OP, name, x)
    return x.contiguous() if x.dim() and x.stride(-1) != 1 else x
