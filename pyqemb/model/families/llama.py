"""Llama: no norm of q and k; biases of attention and MLP if config.json sets them.

Source: Llama 2, arXiv 2307.09288, section 2; Llama 3, arXiv 2407.21783, section 3.2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pyqemb.model.config import DecoderConfig
from pyqemb.model.decoder import Family
from pyqemb.model.rope import has_base


@dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """`model_type` "llama"."""

    model_type: str = "llama"

    architectures: ClassVar[Sequence[str]] = ("LlamaForCausalLM", "LlamaModel", "LlamaForSequenceClassification")
    reads_attention_bias: ClassVar[bool] = True
    reads_mlp_bias: ClassVar[bool] = True

    @classmethod
    def defaults(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        return older_defaults(values)


def older_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of Llama, Qwen2 and Mistral for absent keys.

    The number of key heads is that of the query heads, and head_dim is hidden_size divided by it.
    """
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    found = {"num_key_value_heads": heads, "tie_word_embeddings": False}
    if type(heads) is int and heads > 0 and type(hidden) is int:
        found["head_dim"] = hidden // heads
    if not has_base(values):
        found["rope_theta"] = 10_000.0
    return found


FAMILY = Family(LlamaConfig)
