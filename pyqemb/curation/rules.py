"""The limits of negatives, and the choice among the candidates."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pyqemb.errors import ConfigError


@dataclass(frozen=True)
class Rules:
    """The limits and options of `pyqemb.mine`. ConfigError names a value out of range."""

    k: int = 7
    max_positive_ratio: float | None = 0.95
    margin: float | None = None
    max_score: float | None = None
    mean_margin: float | None = None
    skip_top: int = 0
    depth: int = 100
    sampling: Literal["top", "random", "softmax"] = "top"
    sampling_temperature: float = 0.05

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"k must be at least 1, got {self.k}")
        if self.depth < self.k:
            raise ConfigError(f"depth must be at least k, {self.k}, got {self.depth}")
        if self.skip_top < 0:
            raise ConfigError(f"skip_top must not be negative, got {self.skip_top}")
        if self.max_positive_ratio is not None and not 0 < self.max_positive_ratio <= 2:
            raise ConfigError(f"max_positive_ratio must be above 0 and at most 2, got {self.max_positive_ratio}")
        if self.sampling not in ("top", "random", "softmax"):
            raise ConfigError(f"sampling must be 'top', 'random' or 'softmax', got {self.sampling!r}")
        if not self.sampling_temperature > 0:
            raise ConfigError(f"sampling_temperature must be above 0, got {self.sampling_temperature}")

    def ceilings(self, positive_N: np.ndarray, mean_N: np.ndarray) -> np.ndarray:
        """Return the maximum score of a negative of each query: float32 [N].

        Args:
            positive_N: float32 [N], the score of each query with its positive.
            mean_N: float32 [N], the mean score of each query with all of its positives.
        """
        ceilings = np.full(len(positive_N), np.inf, dtype=np.float32)
        if self.max_positive_ratio is not None:
            ceilings = np.minimum(ceilings, positive_N - (1 - self.max_positive_ratio) * np.abs(positive_N))
        if self.margin is not None:
            ceilings = np.minimum(ceilings, positive_N - self.margin)
        if self.max_score is not None:
            ceilings = np.minimum(ceilings, self.max_score)
        if self.mean_margin is not None:
            ceilings = np.minimum(ceilings, mean_N + np.float32(self.mean_margin))
        return ceilings.astype(np.float32)

    def choose(self, scores_NC: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Choose up to `k` candidates of each query.

        Args:
            scores_NC: float32 [N, C], the scores of the candidates that qualify, best first, padded with -inf.
            generator: the random generator if `sampling` is "random" or "softmax".

        Returns:
            int64 [N, at most k]: columns of `scores_NC`, in ascending order.
        """
        scores_NC = scores_NC[:, self.skip_top : self.skip_top + self.depth]
        if self.sampling == "top" or scores_NC.shape[1] <= self.k:
            places = np.broadcast_to(np.arange(scores_NC.shape[1]), scores_NC.shape)
        else:
            # Gumbel-top-k: with Gumbel noise on the log weights, the k largest are a sample without replacement.
            logits = scores_NC / self.sampling_temperature if self.sampling == "softmax" else np.zeros_like(scores_NC)
            noisy = np.where(np.isfinite(scores_NC), logits + generator.gumbel(size=scores_NC.shape), -np.inf)
            places = np.sort(np.argsort(-noisy, axis=1)[:, : self.k], axis=1)
        return self.skip_top + places[:, : self.k]
