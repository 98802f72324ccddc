"""`attn_implementation="pyqemb"`: the packed attention under any decoder of transformers.

Legend: B rows, Q queries and S keys of a row, T and U of them that are no padding, N query heads, K key heads, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyqemb import ops
from pyqemb.errors import ConfigError

NAME = "pyqemb"
MaskFunction = Callable[[Tensor, int, Tensor, Tensor], Any]  # (row, head, query, key) -> whether it may look


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the sequences lie in padded rows: made once a forward pass in place of a mask, used by every layer."""

    causal: bool
    plan: ops.AttentionPlan
    keys: int  # of a row; a cache may have room for more
    queries_T: Tensor | None = None  # which of the B * Q; None: all
    keys_U: Tensor | None = None  # which of the B * keys
    ndim: int = (
        0  # transformers looks whether a mask is a padding mask; generation hands this one back to be made a mask of
    )


def register_transformers() -> None:
    """Make `attn_implementation="pyqemb"` known to transformers, for padded or packed input, causal or not.

    It computes what "eager" does, forward and backward, and leaves padding out; there it gives zeros. Whatever it does not know is
    refused with a ValueError: sliding windows shorter than the input, soft caps, sinks, dropout, masks that are not made of sequences.

    Raises ConfigError: transformers is not there, or older than 4.57.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ConfigError("register_transformers needs transformers 4.57 or later: pip install 'pyqemb[hf]'") from error
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _layout)


def _layout(
    batch_size: int,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    *,
    mask_function: MaskFunction,
    attention_mask: Tensor | Layout | None = None,
    cache_position: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Layout:
    """What transformers' models ask for a mask; version 4 gives `cache_position` in place of q_length and q_offset."""
    if isinstance(attention_mask, Layout):
        return attention_mask
    if cache_position is not None:
        q_length, q_offset, device = len(cache_position), cache_position[0], cache_position.device
    if int(kv_offset):
        raise ValueError(f"[{NAME}] expected a cache that holds all tokens, got one that starts at {int(kv_offset)}")
    first = int(q_offset)
    keys = first + q_length
    real_BS = torch.ones(batch_size, keys, dtype=torch.bool, device=device)
    if attention_mask is not None:
        given = attention_mask[:, :keys].bool()
        real_BS = F.pad(given, (0, keys - given.shape[1]), value=True)
    starts_BS, causal = _sequences(mask_function, first, real_BS)
    sequence_BS = starts_BS.flatten().cumsum(0).view_as(starts_BS) - 1
    count = int(starts_BS.sum())
    cu_q, cu_k = (_cu_seqlens(sequence_BS[:, at:][real_BS[:, at:]], count) for at in (first, 0))
    plan = ops.attention_plan(cu_q, cu_k, device=real_BS.device)
    if real_BS.all():
        return Layout(causal, plan, keys)
    queries_T, keys_U = (real_BS[:, at:].flatten().nonzero().flatten() for at in (first, 0))
    return Layout(causal, plan, keys, queries_T, keys_U)


def _sequences(mask: MaskFunction, first: int, real_BS: Tensor) -> tuple[Tensor, bool]:
    """Where sequences start, bool [B, S], and whether they are causal, for queries from `first` on.

    The mask is a function; it is asked at a few places for each query, not at all. Raises ValueError where it is not made of sequences.
    """
    batch, keys = real_BS.shape
    row_B1 = torch.arange(batch, device=real_BS.device)[:, None]
    at_BS = torch.arange(keys, device=real_BS.device).expand(batch, keys)

    def sees(query: Tensor, key: Tensor) -> Tensor:
        return torch.as_tensor(mask(row_B1, 0, query, key), device=real_BS.device).expand_as(query)

    starts_BS = at_BS == 0
    if first == 0:
        starts_BS = torch.cat([starts_BS[:, :1], ~sees(at_BS[:, 1:], at_BS[:, :-1])], dim=1)
    query, start = at_BS[:, first:], torch.where(starts_BS, at_BS, 0).cummax(1).values[:, first:]
    good = sees(query, start) & ~(sees(query, (start - 1).clamp(min=0)) & (start > 0))
    # Of two neighbours in one sequence the first sees the second under the full mask alone.
    together = ~starts_BS[:, first + 1 :]
    ahead = sees(query[:, :-1], query[:, 1:])
    causal = not bool((ahead & together).any())
    good[:, :-1] &= ~together | (ahead != causal)
    if not bool((good | ~real_BS[:, first:]).all()):
        raise ValueError(f"[{NAME}] expected causal or full attention inside sequences, got another mask")
    return starts_BS, causal


def _cu_seqlens(sequence_T: Tensor, count: int) -> Tensor:
    """int32 [count + 1] on the CPU, of the sequence that each token belongs to."""
    return F.pad(torch.bincount(sequence_T, minlength=count).cumsum(0), (1, 0)).int().cpu()


def _attend(
    module: torch.nn.Module,
    query_BNQD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' layers: [B, Q, N, D]."""
    for name, value in {
        "dropout": dropout or None,
        **{name: options.get(name) for name in ("softcap", "s_aux")},
    }.items():
        if value is not None:
            raise ValueError(f"[{NAME}] {name} is not supported, got {value!r}")
    batch, _, length, dim = query_BNQD.shape
    if sliding_window is not None and sliding_window < key_BKSD.shape[2]:
        raise ValueError(
            f"[{NAME}] a sliding window of {sliding_window} is shorter than the {key_BKSD.shape[2]} tokens"
        )
    if value_BKSD.shape[-1] != dim:
        raise ValueError(f"[{NAME}] expected values as wide as queries, {dim}, got {value_BKSD.shape[-1]}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    layout = attention_mask
    if not isinstance(layout, Layout):
        layout = _rows_or_packed(attention_mask, options, batch, length, key_BKSD.shape[2], causal, query_BNQD.device)
    q, k, v = (x.transpose(1, 2) for x in (query_BNQD, key_BKSD[:, :, : layout.keys], value_BKSD[:, :, : layout.keys]))
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    if layout.queries_T is not None:
        q, k, v = q[layout.queries_T], k[layout.keys_U], v[layout.keys_U]
    out = ops.varlen_attention(q, k, v, None, causal=layout.causal, scale=scaling, plan=layout.plan)
    if layout.queries_T is not None:
        out = out.new_zeros(batch * length, *out.shape[1:]).index_copy(0, layout.queries_T, out)
    return out.view(batch, length, *out.shape[1:]), None


def _rows_or_packed(
    mask: Any, options: dict[str, Any], batch: int, length: int, keys: int, causal: bool, device: torch.device
) -> Layout:
    """Where no mask was made: one row packed by `cu_seq_lens_q` and `cu_seq_lens_k`, as for flash attention, or rows without padding."""
    if mask is not None:
        raise ValueError(
            f"[{NAME}] expected a padding mask [rows, tokens] or none, got one of shape {list(mask.shape)}"
        )
    cu_q, cu_k = options.get("cu_seq_lens_q"), options.get("cu_seq_lens_k")
    if cu_q is None:
        cu_q, cu_k = (torch.arange(batch + 1, dtype=torch.int32) * n for n in (length, keys))
    plan = ops.attention_plan(
        cu_q.int(), None if cu_k is None else cu_k.int(), tokens=batch * length, tokens_k=batch * keys, device=device
    )
    return Layout(causal, plan, keys)
