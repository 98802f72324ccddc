"""Qwen3: a norm of each head of q and k; biases of the attention if config.json sets them.

Source: Qwen3 technical report, arXiv 2505.09388, section 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pyqemb.model.config import DecoderConfig
from pyqemb.model.decoder import Family


@dataclass(frozen=True)
class Qwen3Config(DecoderConfig):
    """`model_type` "qwen3"."""

    model_type: str = "qwen3"

    architectures: ClassVar[Sequence[str]] = ("Qwen3ForCausalLM", "Qwen3Model", "Qwen3ForSequenceClassification")
    qk_norm: ClassVar[bool] = True
    reads_attention_bias: ClassVar[bool] = True


FAMILY = Family(Qwen3Config)
