"""What the jobs need of a model. Embedder and Reranker have it; so has any other class with these methods."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from pyqemb.data.batch import PackedBatch
from pyqemb.data.tokenizer import Tokenizer


class TextEncoder(Protocol):
    """Packed tokens to one row for each sequence: the forward pass that training differentiates.

    An Embedder gives unit vectors, a Reranker the two logits of each pair.
    """

    @property
    def tokenizer(self) -> Tokenizer:
        """Texts to token ids."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and the rows."""
        ...

    def __call__(self, batch: PackedBatch, /) -> torch.Tensor:
        """Rows [B, E] of the sequences of `batch`, differentiable."""
        ...


class Ranks(Protocol):
    """The ranks that encode together: of the chunks of a batch each passes every `size`-th through the model."""

    @property
    def rank(self) -> int:
        """Of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """The number of ranks."""
        ...

    def gather_rows(self, own_BE: torch.Tensor, partition: Sequence[np.ndarray], batch: PackedBatch) -> torch.Tensor:
        """The rows of all sequences, [B, E], on every rank, given those of this rank's sequences.

        Args:
            own_BE: the rows of this rank's sequences, in the order of its part of `partition`.
            partition: for each rank the places, in the result, of its sequences.
            batch: all sequences, the same on every rank.
        """
        ...


class VectorEncoder(Protocol):
    """Texts to vectors: what evaluation needs."""

    def encode_query(
        self, texts: Sequence[str], *, instruction: str | None = None, dim: int | None = None
    ) -> np.ndarray:
        """float32 [len(texts), dim or E]; `instruction` None: the model's own."""
        ...

    def encode_document(self, texts: Sequence[str], *, dim: int | None = None) -> np.ndarray:
        """float32 [len(texts), dim or E]."""
        ...


@runtime_checkable
class PairScorer(Protocol):
    """(query, document) pairs to scores: what evaluating a reranker needs."""

    def score(
        self, pairs: Sequence[tuple[str, str]], instruction: str | Sequence[str | None] | None = None
    ) -> np.ndarray:
        """float32 [len(pairs)]; `instruction`: one for all pairs, or one for each."""
        ...
