"""The vectors of another model, cached on disk: a guide's, and a teacher's, with which the student's are compared.

Legend: S texts of this rank, E the student's dimension, F the teacher's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyqemb import ops
from pyqemb.data.batch import to_device
from pyqemb.data.loader import TrainingBatch
from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.model.cached_encoder import CachedEncoder
from pyqemb.model.checkpoint import write_safetensors
from pyqemb.model.encoder import open_encoder
from pyqemb.training.config import GuideSection, TeacherSection

PROJECTION = "projection.safetensors"
Section = TypeVar("Section", TeacherSection, GuideSection)


class OtherModel(Generic[Section]):
    """Another embedding model, whose vectors are cached on disk.

    Args:
        section: the settings; `section.model` is its folder or name.
        cache: the folder of its vectors.
        device: the device on which it encodes.

    Raises:
        ConfigError, CheckpointError: the model cannot be opened, or the cache cannot be written.

    Attributes:
        key: the name of the section, for messages.
        dim: the dimension F of its vectors.
        used: how many of their first features are compared (default: all).
    """

    key: ClassVar[str]

    def __init__(self, section: Section, cache: Path, device: torch.device):
        self.section: Section = section
        try:
            encoder = open_encoder(section.model, str(device))
        except CheckpointError as error:
            raise CheckpointError(f"{self.key}.model: {error}") from error
        self._encoder = CachedEncoder(encoder, cache)
        self.dim = self.used = int(self._encoder.encode_document([""]).shape[1])

    def vectors(self, batch: TrainingBatch, texts: Sequence[int]) -> np.ndarray:
        """The model's unit vectors of some texts of a batch, float32 [S, F].

        A text that is a query is encoded as one, with the instruction of its row (default: the model's own); others
        are documents.

        Raises:
            CheckpointError: a vector has no direction, because the features that are compared are all 0.
        """
        queries = dict(zip(reversed(batch.query_text.tolist()), reversed(batch.examples), strict=True))  # the first row
        groups: dict[tuple[bool, str | None], list[int]] = {}
        for place, text in enumerate(texts):
            row = queries.get(text)
            groups.setdefault((row is not None, None if row is None else row.instruction), []).append(place)
        result = np.empty((len(texts), self.dim), dtype=np.float32)
        for (is_query, instruction), places in groups.items():
            chosen = [texts[place] for place in places]
            result[places] = (
                self._encoder.encode_query([queries[text].query for text in chosen], instruction=instruction)
                if is_query
                else self._encoder.encode_document([batch.texts[text] for text in chosen])
            )
        if len(zero := np.flatnonzero(~result[:, : self.used].any(axis=1))):
            raise CheckpointError(
                f"{self.key}.model: {self.section.model} gives a zero vector for {batch.texts[texts[zero[0]]][:200]!r}"
            )
        return result


class Guide(OtherModel[GuideSection]):
    """A model that decides which candidates of InfoNCE are false negatives."""

    key = "guide"


class Teacher(OtherModel[TeacherSection]):
    """The teacher of a run, and the loss of a batch."""

    key = "teacher"

    def loss(self, batch: TrainingBatch, texts: Sequence[int], own_SE: Tensor, projection_FE: Tensor | None) -> Tensor:
        """This rank's part of the mean over the texts of the batch: a scalar in float32, differentiable.

        Args:
            batch: the texts.
            texts: the indices of this rank's texts in `batch.texts`, possibly none.
            own_SE: the student's unit vectors of these texts.
            projection_FE: the learned projection. None: the teacher's vectors are truncated to E features.
        """
        if not len(texts):
            return 0 * own_SE.sum() + (0 if projection_FE is None else 0 * projection_FE.sum())
        teacher_SF = to_device(torch.from_numpy(self.vectors(batch, texts)), own_SE.device)
        return teacher_loss(own_SE, teacher_SF, projection_FE, self.section.cosine, self.section.mse) / len(batch.texts)


def teacher_loss(own_SE: Tensor, teacher_SF: Tensor, projection_FE: Tensor | None, cosine: float, mse: float) -> Tensor:
    """The sum over the texts of `cosine` * (1 - cosine similarity) + `mse` * mean squared error of the features.

    Source: jina-embeddings-v5 (arXiv 2602.15547), stage 1: the cosine distance after a learned projection.
    """
    loss = own_SE.new_zeros(())
    if cosine:
        loss = loss + cosine * ops.distill_embeddings(own_SE, teacher_SF, projection_FE, reduction="sum")
    if mse:
        size = own_SE.shape[1] if projection_FE is None else teacher_SF.shape[1]
        target = F.normalize(teacher_SF[:, :size].to(own_SE.dtype), dim=1)
        student = own_SE if projection_FE is None else own_SE @ projection_FE.to(own_SE.dtype).T
        loss = loss + mse * F.mse_loss(student, target, reduction="sum") / size
    return loss


def first_projection(teacher_dim: int, dim: int, seed: int) -> Tensor:
    """The projection before the first step: rows or columns are orthonormal, float32 [F, E]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.init.orthogonal_(torch.empty(teacher_dim, dim), generator=generator)


def check_dims(section: TeacherSection, teacher_dim: int, dim: int) -> None:
    """Raise ConfigError if the teacher's vectors are shorter than the model's and nothing projects them."""
    if not section.projection and teacher_dim < dim:
        raise ConfigError(
            f"teacher.projection: the teacher's vectors have {teacher_dim} features, the model's {dim}; expected true"
        )


def write_projection(folder: Path, projection_FE: Tensor) -> None:
    """Write the projection as `projection.weight`, apart from the model."""
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / PROJECTION, {"projection.weight": projection_FE.detach().float().cpu().contiguous()})
