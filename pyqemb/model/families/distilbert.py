"""DistilBERT: BERT without token types, with other names of settings and weights.

Source: Sanh et al. 2019, arXiv 1910.01108, section 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pyqemb.data.folder import Rule, one_of
from pyqemb.errors import ConfigError
from pyqemb.model.decoder import Family
from pyqemb.model.families.bert import BertBlock, BertConfig, BertEmbedding, no_norm

if TYPE_CHECKING:
    from typing_extensions import Self

# Settings, and their names in config.json.
OTHER_NAMES = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "hidden_act": "activation",
}


@dataclass(frozen=True)
class DistilBertConfig(BertConfig):
    """`model_type` "distilbert"."""

    model_type: str = "distilbert"
    type_vocab_size: int = 0

    architectures: ClassVar[Sequence[str]] = (
        "DistilBertModel", "DistilBertForMaskedLM", "DistilBertForSequenceClassification"
    )  # fmt: skip
    keys: ClassVar[Mapping[str, Rule | None]] = {
        "is_causal": one_of(False),
        "is_decoder": one_of(False, None),
        "sinusoidal_pos_embds": one_of(True, False),  # how the rows of the positions are initialized; they are stored
        "dropout": None,
        "qa_dropout": None,
        "seq_classif_dropout": None,
        "tie_weights_": None,
    }
    written: ClassVar[Mapping[str, Any]] = {
        "dropout": 0.1, "attention_dropout": 0.1, "sinusoidal_pos_embds": False, "pad_token_id": 0
    }  # fmt: skip
    derived: ClassVar[Sequence[str]] = (*BertConfig.derived, "type_vocab_size", "layer_norm_eps")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Self":
        for ours, theirs in OTHER_NAMES.items():
            if ours in values:
                raise ConfigError(f"{ours!r} is not known for model_type 'distilbert', expected {theirs!r}")
        ours_of = {theirs: ours for ours, theirs in OTHER_NAMES.items()}
        try:
            return super().from_dict({ours_of.get(name, name): value for name, value in values.items()})
        except ConfigError as error:
            message = str(error)
            for ours, theirs in OTHER_NAMES.items():
                message = message.replace(ours, theirs)
            raise ConfigError(message) from error

    def to_dict(self) -> dict[str, Any]:
        return {OTHER_NAMES.get(name, name): value for name, value in super().to_dict().items()}


def read_name(name: str) -> str | None:
    """The name without the prefix of a model with a head; None for the heads and for buffers."""
    if name.startswith(("vocab_transform.", "vocab_layer_norm.", "vocab_projector.", "pre_classifier.", "classifier.")):
        return None
    ours = name.removeprefix("distilbert.")
    return None if ours == "embeddings.position_ids" else ours


WEIGHT_NAMES = {
    "embed_tokens.weight": "embeddings.word_embeddings.weight",
    "embed_tokens.": "embeddings.",
    "layers.": "transformer.layer.",
    "self_attn.q_proj": "attention.q_lin",
    "self_attn.k_proj": "attention.k_lin",
    "self_attn.v_proj": "attention.v_lin",
    "self_attn.o_proj": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "mlp.up_proj": "ffn.lin1",
    "mlp.down_proj": "ffn.lin2",
    "output_norm": "output_layer_norm",
}

FAMILY = Family(DistilBertConfig, BertBlock, BertEmbedding, no_norm, WEIGHT_NAMES, read_name)
