"""RoBERTa and XLM-RoBERTa: BERT whose first position is the row after that of the padding token.

Source: Liu et al. 2019, arXiv 1907.11692; Conneau et al. 2019, arXiv 1911.02116.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pyqemb.errors import ConfigError
from pyqemb.model.decoder import Family
from pyqemb.model.families.bert import WEIGHT_NAMES, BertBlock, BertConfig, BertEmbedding, no_norm, read_name


@dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """`model_type` "roberta"."""

    model_type: str = "roberta"
    pad_token_id: int = 1

    architectures: ClassVar[Sequence[str]] = (
        "RobertaModel", "RobertaForMaskedLM", "RobertaForSequenceClassification"
    )  # fmt: skip
    written: ClassVar[Mapping[str, Any]] = {
        name: value for name, value in BertConfig.written.items() if name != "pad_token_id"
    }

    def __post_init__(self) -> None:
        if type(self.pad_token_id) is not int or self.pad_token_id < 0:
            raise ConfigError(f"pad_token_id must be a token id, got {self.pad_token_id!r}")
        super().__post_init__()

    @property
    def max_tokens(self) -> int:
        return self.max_position_embeddings - self.pad_token_id - 1


@dataclass(frozen=True)
class XlmRobertaConfig(RobertaConfig):
    """`model_type` "xlm-roberta"."""

    model_type: str = "xlm-roberta"

    architectures: ClassVar[Sequence[str]] = (
        "XLMRobertaModel", "XLMRobertaForMaskedLM", "XLMRobertaForSequenceClassification"
    )  # fmt: skip


FAMILY = Family(RobertaConfig, BertBlock, BertEmbedding, no_norm, WEIGHT_NAMES, read_name)
XLM_FAMILY = Family(XlmRobertaConfig, BertBlock, BertEmbedding, no_norm, WEIGHT_NAMES, read_name)
