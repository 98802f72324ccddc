"""The shapes that tests and benchmarks share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pyqemb.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class AttentionCase:
    """The shapes of one attention call; without `key_lengths` the keys are as many as the queries."""

    name: str
    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    causal: bool = False
    key_lengths: tuple[int, ...] | None = None


# Tile edges of the CPU kernels: 48 queries, 256 keys forward; 96 and 192 backward; up to 288 queries to a
# work item forward, 1152 keys backward.
ATTENTION_CASES = [
    AttentionCase("one token", (1,)),
    AttentionCase("one sequence", (65,)),
    AttentionCase("around the query tile", (47, 48, 49)),
    AttentionCase("around the key tile", (255, 256, 257), 2, 1, 32),
    AttentionCase("around the backward tiles", (95, 96, 97, 191, 192, 193), 2, 2, 16),
    AttentionCase("longer than a work item", (600, 289, 288, 287), 2, 1, 24),
    AttentionCase("several chunks of keys", (1152, 1153, 40, 2400), 2, 1, 16),
    AttentionCase("zero lengths", (0, 5, 0, 0, 9, 0)),
    AttentionCase("a hundred tiny ones", (1, 2, 3, 1, 7) * 20, 2, 1, 8),
    AttentionCase("one head each", (33, 12), 3, 3, 40),
    AttentionCase("groups of eight", (33, 12), 8, 1, 128),
    AttentionCase("widest head", (20, 31), 2, 1, 256),
    AttentionCase("one query a sequence", (1, 1, 1), 4, 2, 64, False, (9, 300, 1)),
    AttentionCase("fewer queries than keys", (3, 50, 7), 4, 2, 64, False, (10, 100, 7)),
    AttentionCase("more queries than keys", (20, 3), 2, 1, 64, False, (4, 0)),
]


def cu_seqlens(lengths: Iterable[int]) -> torch.Tensor:
    """[0, ..., T] int32 of the lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def heavy_tailed(count: int, median: float, sigma: float = 0.8, cap: int = 512, seed: int = 0) -> list[int]:
    """Lognormal lengths: short queries (median 16) or documents (median 100) as they come."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(count, generator=generator) * sigma
    return [int(x) for x in (median * draws.exp()).round().clamp(1, cap)]


def texts_of(words: str, tokenizer: Tokenizer, lengths: Sequence[int], seed: int = 0) -> list[str]:
    """Stretches of real text of about these many tokens."""
    ids = tokenizer.backend.encode(words[:400_000], add_special_tokens=False).ids
    starts = np.random.default_rng(seed).integers(0, len(ids) - 600, len(lengths))
    return [
        tokenizer.backend.decode(ids[start : start + max(length - 1, 1)]).strip() or "a"
        for start, length in zip(starts, lengths, strict=True)
    ]
