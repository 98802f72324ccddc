"""Qwen2: no norm of q and k; q, k and v always have biases.

Source: Qwen2 technical report, arXiv 2407.10671, section 2.2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pyqemb.model.config import DecoderConfig
from pyqemb.model.decoder import Family
from pyqemb.model.families.llama import older_defaults


@dataclass(frozen=True)
class Qwen2Config(DecoderConfig):
    """`model_type` "qwen2"."""

    model_type: str = "qwen2"

    architectures: ClassVar[Sequence[str]] = ("Qwen2ForCausalLM", "Qwen2Model", "Qwen2ForSequenceClassification")

    @property
    def qkv_bias(self) -> bool:
        return True

    @classmethod
    def defaults(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        return older_defaults(values)


FAMILY = Family(Qwen2Config)
