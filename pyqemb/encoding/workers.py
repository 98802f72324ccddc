"""The worker of a job: a model that encodes the rows of a part into its files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pyqemb.encoding.inputs import Row
from pyqemb.errors import DataError
from pyqemb.jobs.parts import VectorPart
from pyqemb.model.embedder import Embedder


@dataclass(frozen=True)
class Settings:
    """The settings that the vectors depend on."""

    model: str
    side: Literal["query", "document", "raw"] = "document"
    instruction: str | None = None
    dim: int | None = None
    max_length: int | None = None
    dtype: str | None = None
    rows_per_part: int = 8192


class Encoder:
    """The model on a device; a call encodes one part."""

    def __init__(self, settings: Settings, device: str):
        self.settings = settings
        self.model = Embedder.from_pretrained(
            settings.model, max_length=settings.max_length, dtype=settings.dtype, device=device
        )

    def __call__(self, target: VectorPart, rows: Sequence[Row]) -> None:
        """Encode rows into the files of their part. DataError if a vector is not finite."""
        vectors = self.vectors([row.text for row in rows])
        if not np.isfinite(vectors).all():
            raise DataError(f"the model gives NaN or infinity for a text of part {target.path.stem}")
        target.write(vectors, None if rows[0].id is None else [str(row.id) for row in rows])

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """The vectors of texts, float32 [N, E]."""
        settings = self.settings
        if settings.side == "query":
            return self.model.encode_query(texts, instruction=settings.instruction, dim=settings.dim)
        if settings.side == "document":
            return self.model.encode_document(texts, dim=settings.dim)
        return self.model.encode(texts, dim=settings.dim)
