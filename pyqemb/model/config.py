"""DecoderConfig: the shape of a decoder or encoder, read from and written to a Hugging Face config.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from pyqemb.data.folder import Rule, check_keys
from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.model.config_keys import HARMLESS
from pyqemb.model.rope import Rope

_MAX_HEAD_DIM = 256
_MAX_COUNT = 2**31 - 1  # of every size; a product of two fits into 64 bits
_MAX_LAYERS = 256

Config = TypeVar("Config", bound="DecoderConfig")


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a decoder. Each family has a subclass, see `pyqemb.model.families`.

    With `is_causal` False, attention is bidirectional. `rope_scaling` is the scaled rotary embedding of config.json,
    None for the plain one. `extra` holds the other keys of the config.json, so that they are written again.
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
    model_type: str = ""
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    architectures: ClassVar[Sequence[str]] = ()  # class names of transformers; the first is written
    hidden_act: ClassVar[str] = "silu"  # the activation of the MLP
    keys: ClassVar[Mapping[str, Rule | None]] = {}  # known settings of config.json that are not fields
    # Settings that are written if absent.
    written: ClassVar[Mapping[str, Any]] = {"attention_dropout": 0.0, "use_sliding_window": False}
    derived: ClassVar[Sequence[str]] = ()  # fields that the config.json of this family does not have
    # An encoder has learned positions instead of a rotary embedding, and bidirectional attention only. Its tokenizer
    # has its own padding token and pads on the right, because positions are counted from the first column.
    is_encoder: ClassVar[bool] = False
    default_pooling: ClassVar[str] = "last"  # of folders that do not say
    qk_norm: ClassVar[bool] = False  # whether each head of q and k is normalized
    reads_attention_bias: ClassVar[bool] = False  # whether attention_bias sets the biases of q, k, v and o_proj
    reads_mlp_bias: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.model_type != type(self).model_type:
            raise ConfigError(f"model_type must be {type(self).model_type!r}, got {self.model_type!r}")
        for name in _COUNTS:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a positive whole number, got {value!r}")
            limit = _MAX_LAYERS if name == "num_hidden_layers" else _MAX_COUNT
            if value > limit:
                raise ConfigError(f"{name} must be at most {limit}, got {value}")
        for name in ("rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ConfigError(f"{name} must be a positive number, got {value!r}")
        for name in ("is_causal", "tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 8 or self.head_dim > _MAX_HEAD_DIM:
            raise ConfigError(f"head_dim must be a multiple of 8 up to {_MAX_HEAD_DIM}, got {self.head_dim}")
        _ = self.rope  # the constructor checks it

    @cached_property
    def rope(self) -> Rope:
        """The rotary embedding that `rope_theta` and `rope_scaling` describe."""
        scaling = dict(self.rope_scaling or {})
        return Rope(self.rope_theta, scaling.pop("rope_type", "default"), scaling)

    @property
    def qkv_bias(self) -> bool:
        """Whether q_proj, k_proj and v_proj have biases."""
        return self.reads_attention_bias and self.attention_bias

    @property
    def output_bias(self) -> bool:
        """Whether o_proj has a bias."""
        return self.reads_attention_bias and self.attention_bias

    @property
    def max_tokens(self) -> int:
        """The number of positions of a text."""
        return self.max_position_embeddings

    def check_length(self, tokens: int | None) -> None:
        """ConfigError if texts of so many tokens have more positions than were learned."""
        if self.is_encoder and tokens is not None and tokens > self.max_tokens:
            raise ConfigError(
                f"max_length must be at most {self.max_tokens}, the number of learned positions, got {tokens}"
            )

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Read the keys of a Hugging Face config; ConfigError for an unsupported key that would change the results."""
        every = {item.name for item in fields(cls)} - {"extra", "rope_theta", "rope_scaling"}
        own = every - {*cls.derived}
        rope_keys = () if cls.is_encoder else _ROPE_KEYS
        cls.check_settings(values)
        _check_known(values, {**dict.fromkeys([*own, *rope_keys]), **cls.keys})
        absent = {name for name in ("head_dim", "num_key_value_heads") if values.get(name) is None}
        values = {**cls.defaults(values), **{name: value for name, value in values.items() if name not in absent}}
        unread = set() if cls.reads_mlp_bias else {"mlp_bias"}
        known = {name: values[name] for name in every - unread if name in values}
        missing = [name for name in _COUNTS if name not in known and name != "max_position_embeddings"]
        if missing:
            raise ConfigError(f"missing {', '.join(missing)}")
        if (bidirectional := values.get(_BIDIRECTIONAL)) is not None:
            known.setdefault("is_causal", not bidirectional)
        known["eos_token_id"] = _first_id(values.get("eos_token_id"))
        # `to_dict` writes the first of `architectures`; the folders of sentence-transformers name the body alone.
        dropped = every | {*_ROPE_KEYS, *_ATTENTION, "architectures"}
        known["extra"] = {name: value for name, value in values.items() if name not in dropped}
        if cls.is_encoder:
            return cls(**known)
        rope = Rope.from_config(values)
        scaling = None if rope.kind == "default" else {"rope_type": rope.kind, **rope.settings}
        return cls(rope_theta=rope.theta, rope_scaling=scaling, **known)

    @classmethod
    def defaults(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults of the keys that a config.json may omit."""
        return {}

    @classmethod
    def check_settings(cls, values: Mapping[str, Any]) -> None:
        """ConfigError for a setting that the decoder does not support."""
        if values.get("hidden_act", cls.hidden_act) != cls.hidden_act:
            raise ConfigError(f"hidden_act must be {cls.hidden_act!r}, got {values['hidden_act']!r}")
        for name in ("use_sliding_window", "quantization_config", "rope_interleaved", "use_mrope"):
            if values.get(name):
                raise ConfigError(f"{name} is not supported, got {values[name]!r}")
        bidirectional = values.get(_BIDIRECTIONAL)
        if bidirectional is not None and not isinstance(bidirectional, bool):
            raise ConfigError(f"{_BIDIRECTIONAL} must be true or false, got {bidirectional!r}")
        if bidirectional is not None and values.get("is_causal") is bidirectional:
            raise ConfigError(
                f"is_causal {bidirectional} contradicts {_BIDIRECTIONAL} {bidirectional}: remove one of them"
            )
        _check_layer_types(values)

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of config.json.

        The rotary embedding is written under both of its names, because each version of transformers reads only one.
        """
        values: dict[str, Any] = {
            "architectures": [self.architectures[0]],
            "hidden_act": self.hidden_act,
        }
        values |= {**self.written, **self.extra}
        written = [item.name for item in fields(self) if item.name not in ("extra", *self.derived)]
        values |= {name: getattr(self, name) for name in written}
        if self.is_encoder:
            return values
        values["rope_parameters"] = self.rope.to_dict()
        if self.is_causal:
            values.pop(_BIDIRECTIONAL, None)
        else:
            values[_BIDIRECTIONAL] = True
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
# The name that other libraries use for is_causal = false; without either, a model is causal.
_BIDIRECTIONAL = "use_bidirectional_attention"
_ATTENTION = (
    "_attn_implementation",
    "attn_implementation",
    "_attn_implementation_internal",
    "_attn_implementation_autoset",
)
_CHECKED = (
    "hidden_act", "use_sliding_window", "quantization_config", "rope_interleaved", "use_mrope", "sliding_window",
    "layer_types", "architectures", _BIDIRECTIONAL, *_ATTENTION,
)  # fmt: skip


def _check_known(values: Mapping[str, Any], rules: Mapping[str, Rule | None]) -> None:
    try:
        check_keys(values, {**HARMLESS, **dict.fromkeys(_CHECKED), **rules}, "")
    except CheckpointError as error:
        raise ConfigError(str(error).removeprefix(": ")) from error


def _check_layer_types(values: Mapping[str, Any]) -> None:
    kinds, layers = values.get("layer_types"), values.get("num_hidden_layers")
    if kinds is None:
        return
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ConfigError(f"layer_types must be a list of names, got {kinds!r}")
    others = set(kinds) - {"full_attention"}
    if others:
        raise ConfigError(f"layer_types may hold 'full_attention' only, got {sorted(others)}")
    if type(layers) is int and len(kinds) != layers:
        raise ConfigError(f"layer_types must name each of num_hidden_layers ({layers}), got {len(kinds)} names")


def _first_id(eos: Any) -> int | None:
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(item) is int for item in ids):
        raise ConfigError(f"eos_token_id must be a token id or a list of them, got {eos!r}")
    return ids[0] if ids else None
