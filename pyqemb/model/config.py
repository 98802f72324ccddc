"""Qwen3Config: the shape of the model, read from and written to a Hugging Face config.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pyqemb.errors import CheckpointError, ConfigError

_MAX_HEAD_DIM = 256
_UNSAFE = "auto_map", "_attn_implementation"


@dataclass(frozen=True)
class Qwen3Config:
    """Sizes and constants of a Qwen3 decoder. `is_causal` False makes its attention bidirectional.

    `extra` keeps the other keys of the config.json that it was read from, so that writing it again loses nothing.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    is_causal: bool = True
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    eos_token_id: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a positive whole number, got {value!r}")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ConfigError(f"{name} must be a positive number, got {value!r}")
        for name in ("is_causal", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 8 or self.head_dim > _MAX_HEAD_DIM:
            raise ConfigError(f"head_dim must be a multiple of 8 up to {_MAX_HEAD_DIM}, got {self.head_dim}")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Qwen3Config":
        """Read `config.json` of a model folder; CheckpointError names it when it is not one that we can run."""
        path = Path(folder) / "config.json"
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder}: has no config.json") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: expected a JSON object")
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Qwen3Config":
        """Read the keys of a Hugging Face config; ConfigError for anything that would change the arithmetic."""
        _refuse_unsupported(values)
        own = {item.name for item in fields(cls)} - {"extra", "rope_theta"}
        missing = [name for name in _COUNTS if name not in values and name != "max_position_embeddings"]
        if missing:
            raise ConfigError(f"missing {', '.join(missing)}")
        eos = values.get("eos_token_id")
        known = {name: values[name] for name in own if name in values}
        # Absent means causal, as everywhere in transformers; another library's name for the same choice is honoured.
        if "is_causal" not in values and "use_bidirectional_attention" in values:
            known["is_causal"] = not values["use_bidirectional_attention"]
        known["eos_token_id"] = eos[0] if isinstance(eos, list) and eos else eos
        known["extra"] = {name: value for name, value in values.items() if name not in own | {*_ROPE_KEYS}}
        return cls(rope_theta=_rope_theta(values), **known)

    def to_dict(self) -> dict[str, Any]:
        """The keys of config.json, rope base under both of its names: each version of transformers reads only one."""
        values: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
        values |= {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False}
        values |= self.extra
        values |= {item.name: getattr(self, item.name) for item in fields(self) if item.name != "extra"}
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.is_causal:
            values.pop("use_bidirectional_attention", None)
        else:
            values["use_bidirectional_attention"] = True
        return values


_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_ROPE_KEYS = ("rope_theta", "rope_parameters", "rope_scaling")


def _refuse_unsupported(values: Mapping[str, Any]) -> None:
    for name in values:
        if name.startswith(_UNSAFE):
            raise ConfigError(f"{name!r} is refused: it makes loaders run code that comes with the model")
    if values.get("model_type") != "qwen3":
        raise ConfigError(f"model_type must be 'qwen3', got {values.get('model_type')!r}")
    if values.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act must be 'silu', got {values['hidden_act']!r}")
    for name in ("attention_bias", "use_sliding_window", "quantization_config"):
        if values.get(name):
            raise ConfigError(f"{name} is not supported, got {values[name]!r}")
    other_layers = set(values.get("layer_types") or ()) - {"full_attention"}
    if other_layers:
        raise ConfigError(f"layer_types may hold 'full_attention' only, got {sorted(map(str, other_layers))}")


def _rope_theta(values: Mapping[str, Any]) -> Any:
    """The rotary base, at the top level or inside rope_parameters; only the plain rotary embedding is known here."""
    found = [] if values.get("rope_theta") is None else [values["rope_theta"]]
    for name in ("rope_parameters", "rope_scaling"):
        inner = values.get(name) or {}
        if not isinstance(inner, Mapping):
            raise ConfigError(f"{name} must be an object, got {inner!r}")
        kind = inner.get("rope_type", inner.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"{name}: only the rope type 'default' is supported, got {kind!r}")
        found += [inner["rope_theta"]] if "rope_theta" in inner else []
    if not found:
        raise ConfigError("missing rope_theta (at the top level or in rope_parameters)")
    if any(theta != found[0] for theta in found):
        raise ConfigError(f"rope_theta is given twice with different values: {found}")
    return found[0]
