"""BERT: learned positions, token types, norms after each sum, GELU, biases, bidirectional attention.

Texts have token type 0. Dropout is not applied.

Source: Devlin et al. 2018, arXiv 1810.04805, section 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from pyqemb.data.batch import PackedBatch
from pyqemb.data.folder import Rule, one_of
from pyqemb.errors import ConfigError
from pyqemb.model.config import DecoderConfig
from pyqemb.model.decoder import Attention, Family, TokenEmbedding, without_prefix
from pyqemb.model.linear import Linear
from pyqemb.model.packed_tokens import PackedTokens
from pyqemb.model.residual_stream import ResidualStream


@dataclass(frozen=True)
class BertConfig(DecoderConfig):
    """`model_type` "bert"."""

    model_type: str = "bert"
    is_causal: bool = False
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    architectures: ClassVar[Sequence[str]] = (
        "BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification"
    )  # fmt: skip
    hidden_act: ClassVar[str] = "gelu"
    keys: ClassVar[Mapping[str, Rule | None]] = {
        "position_embedding_type": one_of("absolute", None),
        "is_causal": one_of(False),
        "is_decoder": one_of(False, None),
        "hidden_dropout_prob": None,
        "attention_probs_dropout_prob": None,
        "directionality": one_of("bidi", None),
        "pooler_fc_size": None,  # settings of heads
        "pooler_num_attention_heads": None,
        "pooler_num_fc_layers": None,
        "pooler_size_per_head": None,
        "pooler_type": None,
    }
    written: ClassVar[Mapping[str, Any]] = {
        "position_embedding_type": "absolute", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
        "pad_token_id": 0,
    }  # fmt: skip
    derived: ClassVar[Sequence[str]] = (
        "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rms_norm_eps", "is_causal", "attention_bias",
        "mlp_bias",
    )  # fmt: skip
    is_encoder: ClassVar[bool] = True
    default_pooling: ClassVar[str] = "mean"

    def __post_init__(self) -> None:
        if self.is_causal is not False:
            raise ConfigError(f"attention must be bidirectional for model_type {self.model_type!r}")
        heads = self.num_attention_heads
        if type(heads) is int and type(self.head_dim) is int and self.hidden_size != heads * self.head_dim:
            raise ConfigError(f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads ({heads})")
        if self.num_key_value_heads != heads:
            raise ConfigError(
                f"num_key_value_heads must be {heads} (num_attention_heads), got {self.num_key_value_heads}"
            )
        super().__post_init__()
        types = self.type_vocab_size
        if "type_vocab_size" not in self.derived and (type(types) is not int or not 1 <= types <= self.vocab_size):
            raise ConfigError(f"type_vocab_size must be a positive whole number up to vocab_size, got {types!r}")
        eps = self.layer_norm_eps
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < float("inf"):
            raise ConfigError(f"layer_norm_eps must be a positive number, got {eps!r}")
        if self.max_tokens < 1:
            raise ConfigError(f"max_position_embeddings must be larger, got {self.max_position_embeddings}")

    @property
    def qkv_bias(self) -> bool:
        return True

    @property
    def output_bias(self) -> bool:
        return True

    @classmethod
    def defaults(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
        found: dict[str, Any] = {"num_key_value_heads": heads}
        if type(heads) is int and heads > 0 and type(hidden) is int:
            found["head_dim"] = hidden // heads
        return found


class BertEmbedding(TokenEmbedding):
    """The norm of the sum of a row for the id, one for the position, and that of token type 0 if there are types."""

    def __init__(self, config: DecoderConfig):
        assert isinstance(config, BertConfig)
        super().__init__(config)
        self.config = config
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.type_vocab_size:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor | None]:  # type: ignore[override]
        """Rows of all tokens, [T, E], and None. ValueError: a text has more tokens than there are positions."""
        longest = self.config.max_tokens
        if batch.max_seqlen > longest:
            raise ValueError(f"batch must have sequences of at most {longest} tokens, got {batch.max_seqlen}")
        positions_T = batch.positions_T + (self.config.max_position_embeddings - longest)
        sum_TE = nn.Embedding.forward(self, batch.input_ids_T)
        if self.config.type_vocab_size:
            sum_TE = sum_TE + self.token_type_embeddings.weight[0]
        return self.LayerNorm(sum_TE + self.position_embeddings(positions_T)), None


class BertAttention(Attention):
    """Attention whose heads are neither normalized nor rotated."""

    def rotate(
        self, q_SND: torch.Tensor, k_TKD: torch.Tensor, tokens: PackedTokens
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The heads as they are."""
        return q_SND, k_TKD


class GeluMLP(nn.Module):
    """down(gelu(up(x))), with the exact GELU."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, x_SE: torch.Tensor) -> torch.Tensor:
        """The input of down_proj, [S, I]."""
        return F.gelu(self.up_proj(x_SE))


class BertBlock(nn.Module):
    """One layer: norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: DecoderConfig, layer: int):
        assert isinstance(config, BertConfig)
        super().__init__()
        self.self_attn = BertAttention(config)
        self.mlp = GeluMLP(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.output_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x_TE: torch.Tensor, tokens: PackedTokens, stream: ResidualStream) -> torch.Tensor:
        """The hidden states of the queries after this layer, [S, E]."""
        attention, mlp = self.self_attn, self.mlp
        attended = attention(x_TE, tokens)
        x_SE = self.attention_norm(stream.add(tokens.queries(x_TE), attention.o_proj, attended))
        return self.output_norm(stream.add(x_SE, mlp.down_proj, mlp(x_SE)))


def no_norm(config: DecoderConfig) -> nn.Module:
    """The layers end with a norm."""
    return nn.Identity()


def read_name(name: str) -> str | None:
    """The name without the prefix of a model with a head; None for the heads and for buffers."""
    ours = without_prefix(name) or ""
    for prefix in ("bert.", "roberta."):
        ours = ours.removeprefix(prefix)
    if ours.startswith(("cls.", "pooler.", "lm_head.")) or ours == "embeddings.position_ids":
        return None
    # Names of TensorFlow in old checkpoints.
    return ours.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


WEIGHT_NAMES = {
    "embed_tokens.weight": "embeddings.word_embeddings.weight",
    "embed_tokens.": "embeddings.",
    "layers.": "encoder.layer.",
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.o_proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up_proj": "intermediate.dense",
    "mlp.down_proj": "output.dense",
    "output_norm": "output.LayerNorm",
}

FAMILY = Family(BertConfig, BertBlock, BertEmbedding, no_norm, WEIGHT_NAMES, read_name)
