"""The loss of one batch: its structure and the configuration make a function of the vectors alone."""

from collections.abc import Callable

import torch

from pyqemb import ops
from pyqemb.data.batch import to_device
from pyqemb.data.loader import TrainingBatch
from pyqemb.training.config import LossSection

LossFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class ContrastiveLoss:
    """InfoNCE of a batch: called with queries_BE and the unique documents_UE, gives the mean loss.

    `stats` holds positive (mean similarity), negative and masked (share of candidates left out) of the last call.
    """

    def __init__(self, batch: TrainingBatch, config: LossSection):
        self.batch, self.config = batch, config
        self.stats: dict[str, float] = {}

    def __call__(self, queries_BE: torch.Tensor, documents_UE: torch.Tensor) -> torch.Tensor:
        batch, config = self.batch, self.config
        positive, owner = (to_device(x, queries_BE.device) for x in (batch.positive, batch.owner))
        rows_M = None if batch.rows_M is None else to_device(batch.rows_M, queries_BE.device)
        loss, self.stats = ops.info_nce(
            queries_BE,
            documents_UE if rows_M is None else documents_UE[rows_M],
            positive,
            owner=owner,
            document_ids=rows_M,
            preset=config.preset,
            temperature=config.temperature,
            margin=config.margin,
            matryoshka=config.matryoshka,
            return_stats=True,
        )
        return loss
