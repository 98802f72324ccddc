"""`attn_implementation="pyqemb"`: packed attention for the models of transformers.

Legend: B rows, Q queries and S keys of a row, N query heads, K key heads, D head dim.
"""

import functools
import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyqemb import ops
from pyqemb.errors import ConfigError
from pyqemb.interop.attention_layout import NAME, Layout, full_rows, layout_of_mask, packed_rows

# Arguments that models pass to attention but no attention function of transformers reads: lengths that are in the
# layout already, flags of other outputs, and model inputs in `**kwargs`.
IGNORED = {
    "cache_position", "deterministic", "input_ids", "labels", "layer_idx", "logits_to_keep", "max_length_k",
    "max_length_q", "num_items_in_batch", "output_hidden_states", "output_router_logits", "position_ids", "return_dict",
    "seq_idx", "token_type_ids", "use_cache",
}  # fmt: skip


def register_transformers() -> None:
    """Register `attn_implementation="pyqemb"` with transformers.

    A model gives the same results as with "eager", forward and backward, or raises a ValueError that names the
    unsupported argument, mask or class. Padding keys are skipped. The outputs of queries without keys, and of the
    padding of causal sequences, are zeros.

    Raises:
        ConfigError: transformers is missing, or older than 4.57.

    Example:
        >>> import torch, transformers
        >>> pyqemb.register_transformers()
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
        ... )
        >>> model = transformers.AutoModel.from_config(config, attn_implementation="pyqemb")
        >>> model(torch.arange(5, 11)[None]).last_hidden_state.shape
        torch.Size([1, 6, 32])
    """
    try:
        from transformers import AttentionInterface, PreTrainedModel
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ConfigError("register_transformers needs transformers 4.57 or later: pip install 'pyqemb[hf]'") from error
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, layout_of_mask)
    models: Any = PreTrainedModel
    if not hasattr(models.get_correct_attn_implementation, "__wrapped__"):
        models.get_correct_attn_implementation = _refusing(models.get_correct_attn_implementation)


def _refusing(choose: Any) -> Any:
    """Wrap transformers' check of an implementation, so that it rejects classes that would not call it."""

    @functools.wraps(choose)
    def check(self: Any, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention == NAME and not _calls_attention_functions(type(self)):
            raise ValueError(
                f"[{NAME}] {type(self).__name__} has its own attention that does not call transformers' "
                "attention functions:"
                f' load it with attn_implementation="eager"'
            )
        return choose(self, requested_attention, is_init_check)

    return check


def _calls_attention_functions(model_class: type) -> bool:
    """Whether the attention classes in a model's file look up their attention function.

    A file without attention classes passes its inputs to other models.
    """
    for parent in model_class.__mro__:
        try:
            source = inspect.getsource(sys.modules[parent.__module__])
        except (KeyError, OSError, TypeError):  # a class defined in a notebook: its base classes decide
            continue
        if re.search(r"^class \w*Attention\w*\(.*Module", source, re.MULTILINE):
            return "ALL_ATTENTION_FUNCTIONS" in source and "_CLASSES[config._attn_implementation]" not in source
    return True


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' layers.

    It maps query [B, N, Q, D], key and value [B, K, S, D] to [B, Q, N, D].
    """
    if not module.training:
        dropout = 0.0
    for name, given in {"dropout": dropout or None, **options}.items():
        if name not in IGNORED and given is not None and given is not False:
            shown = f"a tensor of shape {list(given.shape)}" if isinstance(given, Tensor) else repr(given)
            raise ValueError(f"[{NAME}] {name} is not supported, got {shown}")
    (batch, _, queries, dim), keys = query.shape, key.shape[2]
    if sliding_window is not None and sliding_window < keys:
        raise ValueError(f"[{NAME}] a sliding window of {sliding_window} is shorter than the {keys} tokens")
    value_dim = value.shape[-1]
    if value_dim > dim:
        raise ValueError(f"[{NAME}] expected values no wider than queries, {dim}, got {value_dim}")
    value = F.pad(value, (0, dim - value_dim))
    causal = getattr(module, "is_causal", True) if is_causal is None else bool(is_causal)
    layout = _check_layout(attention_mask, cu_seq_lens_q, cu_seq_lens_k, (batch, queries, keys), causal, query.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key[:, :, : layout.keys], value[:, :, : layout.keys]))
    if layout.queries_T is not None:
        q = q[layout.queries_T]
    if layout.keys_U is not None:
        k, v = k[layout.keys_U], v[layout.keys_U]
    out = ops.varlen_attention(q, k, v, None, causal=layout.causal, scale=scaling, plan=layout.plan)[..., :value_dim]
    if layout.queries_T is not None:
        out = out.new_zeros(batch * queries, *out.shape[1:]).index_copy(0, layout.queries_T, out)
    return out.reshape(batch, queries, *out.shape[1:]), None


def _check_layout(
    mask: Any,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    sizes: tuple[int, int, int],
    causal: bool,
    device: torch.device,
) -> Layout:
    """Return the layout that was made for this layer.

    Without one, the rows have no padding, or they are packed as for flash attention.
    """
    if isinstance(mask, Layout):
        if mask.sizes != sizes and not mask.unmasked:
            raise ValueError(
                f"[{NAME}] the attention mask is for (rows, queries, keys) {mask.sizes}, the layer has {sizes}"
            )
        for name, given, made in (
            ("cu_seq_lens_q", cu_q, mask.cu_seqlens),
            ("cu_seq_lens_k", cu_k, mask.cu_seqlens_k),
        ):
            if given is not None and not torch.equal(given.long().cpu(), made.long().cpu()):
                raise ValueError(f"[{NAME}] {name} differs from the sequences of the attention mask")
        return mask if mask.sizes == sizes else full_rows(sizes, device)
    if mask is not None:
        raise ValueError(
            f"[{NAME}] expected a padding mask [rows, tokens] or none, got one of shape {list(mask.shape)}"
            " that the model or its caller made"
        )
    if cu_q is not None and cu_k is not None:
        return packed_rows(cu_q, cu_k, sizes, causal, device)
    if cu_q is not None or cu_k is not None:
        raise ValueError(f"[{NAME}] cu_seq_lens_q and cu_seq_lens_k must be given together")
    if causal and sizes[1] > 1:
        raise ValueError(f"[{NAME}] no attention mask was made for a layer that is causal")
    return full_rows(sizes, device)
