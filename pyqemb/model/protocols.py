"""The interfaces that jobs require of a model; Embedder and Reranker implement them, and other classes can."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from pyqemb.data.batch import PackedBatch
from pyqemb.data.tokenizer import Tokenizer


class TextEncoder(Protocol):
    """A differentiable forward pass from packed tokens to one row for each sequence, as used in training.

    An Embedder returns unit vectors, a Reranker the two logits of each pair.
    """

    @property
    def tokenizer(self) -> Tokenizer:
        """Texts to token ids."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the parameters and the rows."""
        ...

    def __call__(self, batch: PackedBatch, /) -> torch.Tensor:
        """Rows [B, E] of the sequences of `batch`, differentiable."""
        ...


class Ranks(Protocol):
    """The ranks that encode together; each passes every `size`-th chunk of a batch through the model."""

    @property
    def rank(self) -> int:
        """The rank of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """The number of ranks."""
        ...

    def gather_rows(self, own_BE: torch.Tensor, partition: Sequence[np.ndarray], batch: PackedBatch) -> torch.Tensor:
        """The rows of all sequences, [B, E], on every rank, given those of this rank's sequences.

        Args:
            own_BE: the rows of this rank's sequences, in the order of its part of `partition`.
            partition: for each rank, the indices of its sequences in the result.
            batch: all sequences, the same on every rank.
        """
        ...


@runtime_checkable
class QueryDocumentEncoder(Protocol):
    """Encodes texts as vectors of their full dimension, as curation requires."""

    def encode_query(self, texts: Sequence[str], *, instruction: str | None = None) -> np.ndarray:
        """float32 [len(texts), E]; `instruction` None: that of the model."""
        ...

    def encode_document(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), E]."""
        ...


@runtime_checkable
class VectorEncoder(Protocol):
    """Encodes texts as vectors, as evaluation requires."""

    def encode_query(
        self, texts: Sequence[str], *, instruction: str | None = None, dim: int | None = None
    ) -> np.ndarray:
        """float32 [len(texts), dim or E]; `instruction` None: that of the model."""
        ...

    def encode_document(self, texts: Sequence[str], *, dim: int | None = None) -> np.ndarray:
        """float32 [len(texts), dim or E]."""
        ...


@runtime_checkable
class PairScorer(Protocol):
    """Scores (query, document) pairs, as evaluation of a reranker requires."""

    def score(
        self, pairs: Sequence[tuple[str, str]], instruction: str | Sequence[str | None] | None = None
    ) -> np.ndarray:
        """float32 [len(pairs)]; `instruction`: one for all pairs, or one for each."""
        ...
