"""The positions of the sequences in padded rows, derived exactly from the mask that transformers would make.

Legend: B rows, Q queries and S keys of a row, T queries and U keys of the N sequences.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from pyqemb import ops

NAME = "pyqemb"
MaskFunction = Callable[[Any, Any, Any, Any], Any]  # (row, head, query, key) -> whether the query sees the key
BLOCK = 1 << 24  # elements of a mask that are examined at once
_MOST_TOKENS = 2**31 - 1  # cu_seqlens is int32


class MaskAccessError(AttributeError, ValueError):
    """The model computes with its attention mask.

    It is an AttributeError, because libraries test inputs with hasattr.
    """


@dataclass(frozen=True, eq=False)
class Layout:
    """The sequences of a batch: made once per forward pass instead of a mask, and used by every layer."""

    causal: bool
    cu_seqlens: Tensor  # int32
    cu_seqlens_k: Tensor
    plan: ops.AttentionPlan
    sizes: tuple[int, int, int]  # rows, queries and keys of a row, which the layers must have
    keys: int  # keys of a row that are visible; a static cache has space for more
    queries_T: Tensor | None = None  # indices among the B * Q; None: all
    keys_U: Tensor | None = None  # indices among the B * keys
    unmasked: bool = False  # transformers makes no mask here, and layers may have other sizes
    ndim: int = 0  # transformers checks it to detect padding masks; generation passes the layout as a mask

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse_computing(name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        _refuse_computing(getattr(function, "__name__", str(function)))


def _refuse_computing(what: str) -> NoReturn:
    raise MaskAccessError(
        f"[{NAME}] the model computes with its attention mask ({what}), which is not a tensor here: load it with"
        ' attn_implementation="sdpa" or "eager"'
    )


_OPERATORS = "getitem eq ne lt le gt ge neg invert add radd sub rsub mul rmul and rand or ror"
for _operator in _OPERATORS.split():
    setattr(Layout, f"__{_operator}__", lambda *_, what=_operator: _refuse_computing(what))


def layout_of_mask(
    batch_size: int,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    *,
    mask_function: MaskFunction,
    attention_mask: Tensor | Layout | None = None,
    cache_position: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Layout:
    """Make the layout that transformers uses as a mask.

    transformers calls this; version 4 passes `cache_position` instead of q_length, q_offset and device.

    Raises ValueError: the mask does not consist of sequences that are all causal or all full.
    """
    if isinstance(attention_mask, Layout):
        return attention_mask
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"[{NAME}] expected a padding mask [rows, tokens] or none, got one of shape {list(attention_mask.shape)}"
        )
    if cache_position is None:
        at_Q = torch.arange(q_length) + int(q_offset) - int(kv_offset)
    else:
        at_Q, device = cache_position.cpu() - int(kv_offset), cache_position.device
    real_BS = torch.ones(batch_size, kv_length, dtype=torch.bool)
    if attention_mask is not None:
        given = attention_mask[:, int(kv_offset) : int(kv_offset) + kv_length].bool().cpu()
        real_BS = F.pad(given, (0, kv_length - given.shape[1])).expand(batch_size, -1)
    if allow_is_bidirectional_skip and _is_full(mask_function) and bool(real_BS.all()):
        layout = full_rows((batch_size, len(at_Q), kv_length), torch.device(device))
        return replace(layout, unmasked=True)
    bounds = _known_bounds(mask_function, at_Q, real_BS)
    if bounds is None:
        options: dict[str, Any] = dict(
            batch_size=batch_size, kv_length=kv_length, kv_offset=kv_offset, mask_function=mask_function,
            attention_mask=attention_mask, allow_is_causal_skip=False, allow_is_bidirectional_skip=False,
        )  # fmt: skip
        queries: dict[str, Any] = dict(q_offset=q_offset, use_vmap=use_vmap, device=device)
        bounds = _bounds(partial(_visible, options, queries, cache_position), len(at_Q), real_BS)
    found = None if bounds is None else _layout(*bounds, at_Q, real_BS, torch.device(device))
    if found is None:
        window = "" if local_size is None else f" with a window or chunks of {local_size} tokens"
        raise ValueError(
            f"[{NAME}] expected causal or full attention inside sequences, got another mask{window}:"
            ' load the model with attn_implementation="sdpa" or "eager"'
        )
    return found


def _visible(
    options: Mapping[str, Any], queries: Mapping[str, Any], cache_position: Tensor | None, first: int, last: int
) -> Tensor:
    """The mask that "sdpa" would get for some of the queries, [B, last - first, S]."""
    from transformers.masking_utils import sdpa_mask

    where = {**queries, "q_length": last - first, "q_offset": queries["q_offset"] + first}
    if cache_position is not None:
        where = dict(cache_position=cache_position[first:last], allow_torch_fix=False)
    mask: Any = sdpa_mask(**options, **where)
    return mask[:, 0]


def _cumulative(ends_N: Tensor) -> Tensor:
    """cu_seqlens of the ends of sequences."""
    if len(ends_N) and int(ends_N[-1]) > _MOST_TOKENS:
        raise ValueError(f"[{NAME}] a batch has at most {_MOST_TOKENS} tokens without padding, got {int(ends_N[-1])}")
    return F.pad(ends_N, (1, 0)).int()


def full_rows(sizes: tuple[int, int, int], device: torch.device) -> Layout:
    """The layout of rows without padding, in which every query sees every key."""
    batch, queries, keys = sizes
    cu_q, cu_k = (torch.arange(batch + 1) * n for n in (queries, keys))
    return packed_rows(cu_q, cu_k, sizes, False, device)


def packed_rows(cu_q: Tensor, cu_k: Tensor, sizes: tuple[int, int, int], causal: bool, device: torch.device) -> Layout:
    """The layout of concatenated sequences without padding, given by lengths."""
    batch, queries, keys = sizes
    # Clamped: values beyond int32 must not wrap to valid ones. The plan then refuses them, without waiting for a GPU.
    cu_q, cu_k = (cu if cu.dtype == torch.int32 else cu.clamp(-1, _MOST_TOKENS).int() for cu in (cu_q, cu_k))
    plan = ops.attention_plan(cu_q, cu_k, tokens=batch * queries, tokens_k=batch * keys, device=device)
    return Layout(causal, cu_q, cu_k, plan, sizes, keys)


def _is_full(mask: MaskFunction) -> bool:
    from transformers import masking_utils

    return mask is getattr(masking_utils, "bidirectional_mask_function", None)


def _known_bounds(mask: MaskFunction, at_Q: Tensor, real_BS: Tensor) -> tuple[Tensor, Tensor] | None:
    """`_bounds` of the two common masks, without materializing them."""
    from transformers import masking_utils

    up_to_BS = F.pad(real_BS.cumsum(1), (1, 0))
    if mask is masking_utils.causal_mask_function:
        last_BQ = up_to_BS[:, (at_Q + 1).clamp(0, real_BS.shape[1])]
    elif _is_full(mask):
        last_BQ = up_to_BS[:, -1:].expand(-1, len(at_Q))
    else:
        return None
    return torch.zeros_like(last_BQ), last_BQ


def _bounds(visible: Callable[[int, int], Tensor], queries: int, real_BS: Tensor) -> tuple[Tensor, Tensor] | None:
    """(first, last) [B, Q]: the keys that a query sees are numbers first to last - 1 among the row's real keys.

    None: not a range.
    """
    batch, keys = real_BS.shape
    number_BS = real_BS.cumsum(1) - 1
    found = []
    step = max(BLOCK // max(batch * keys, 1), 1)
    for start in range(0, queries, step):
        seen_BQS = visible(start, min(start + step, queries)).to(torch.uint8)
        count = seen_BQS.sum(2, dtype=torch.int64)
        found.append(torch.stack([count, seen_BQS.argmax(2), keys - 1 - seen_BQS.flip(2).argmax(2)]).cpu())
    count_BQ, first_BQ, last_BQ = torch.cat(found, dim=2)
    first_BQ, last_BQ = number_BS.gather(1, first_BQ), number_BS.gather(1, last_BQ) + 1
    empty_BQ = count_BQ == 0
    first_BQ, last_BQ = first_BQ.masked_fill(empty_BQ, 0), last_BQ.masked_fill(empty_BQ, 0)
    return (first_BQ, last_BQ) if torch.equal(last_BQ - first_BQ, count_BQ) else None


def _layout(first_BQ: Tensor, last_BQ: Tensor, at_Q: Tensor, real_BS: Tensor, device: torch.device) -> Layout | None:
    """The sequences in which every query sees all keys, or else its own and all earlier keys. None: neither.

    A query of a causal sequence has the position of a key, and is padding if that key is. In other sequences all
    queries are computed.
    """
    batch, keys = real_BS.shape
    row_start_B1 = F.pad(real_BS.sum(1).cumsum(0), (1, 0))[:-1, None]
    sees_BQ = last_BQ > first_BQ
    first_BQ, last_BQ = first_BQ + row_start_B1, last_BQ + row_start_B1
    for causal in (False, True):
        if causal:
            inside_Q = (at_Q >= 0) & (at_Q < keys)
            sees_BQ = sees_BQ & (real_BS[:, at_Q.clamp(0, max(keys - 1, 0))] | ~inside_Q)
        queries_T = sees_BQ.flatten().nonzero().flatten()
        first_T, last_T = first_BQ.flatten()[queries_T], last_BQ.flatten()[queries_T]
        joined = (first_T[1:] == first_T[:-1]) & (last_T[1:] == last_T[:-1] + causal)
        begins = F.pad(~joined, (1, 0), value=True)[: len(first_T)].nonzero().flatten()
        ends = torch.cat([begins[1:], begins.new_tensor([len(first_T)])])[: len(begins)]
        first_N, last_N = first_T[begins], last_T[ends - 1]
        if bool((first_N[1:] >= last_N[:-1]).all()):
            break
    else:
        return None
    covered = torch.zeros(int(real_BS.sum()) + 1, dtype=torch.int64)
    covered = covered.index_add(0, first_N, torch.ones_like(first_N)).index_add(0, last_N, -torch.ones_like(last_N))
    places_U = real_BS.flatten().nonzero().flatten()[covered.cumsum(0)[:-1] > 0]
    seen = int((places_U % keys).max()) + 1 if len(places_U) else 0
    keys_U = places_U // keys * seen + places_U % keys if seen else places_U
    cu_q, cu_k = (_cumulative(x) for x in (ends, (last_N - first_N).cumsum(0)))
    queries = len(at_Q)
    return Layout(
        causal,
        cu_q,
        cu_k,
        ops.attention_plan(cu_q, cu_k, device=device),
        (batch, queries, keys),
        seen,
        None if len(queries_T) == batch * queries else queries_T.to(device),
        None if len(keys_U) == batch * seen else keys_U.to(device),
    )
