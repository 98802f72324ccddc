"""Mistral: no norm of q and k, no biases; a sliding window is supported if no text is longer than the window.

Source: Mistral 7B, arXiv 2310.06825, section 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pyqemb.errors import ConfigError
from pyqemb.model.config import DecoderConfig
from pyqemb.model.decoder import Family
from pyqemb.model.families.llama import older_defaults


@dataclass(frozen=True)
class MistralConfig(DecoderConfig):
    """`model_type` "mistral"."""

    model_type: str = "mistral"

    architectures: ClassVar[Sequence[str]] = ("MistralForCausalLM", "MistralModel", "MistralForSequenceClassification")
    written: ClassVar[Mapping[str, Any]] = {"attention_dropout": 0.0, "sliding_window": None}

    @classmethod
    def defaults(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        return older_defaults(values)

    @classmethod
    def check_settings(cls, values: Mapping[str, Any]) -> None:
        super().check_settings(values)
        window, positions = values.get("sliding_window"), values.get("max_position_embeddings")
        if window is not None and (type(window) is not int or type(positions) is not int or window < positions):
            raise ConfigError(f"sliding_window is not supported, got {window!r}")


FAMILY = Family(MistralConfig)
