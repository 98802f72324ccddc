"""Texts as sets of word n-grams, for de-duplication and decontamination."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyqemb import _C
from pyqemb.ops.checks import integer

_MOST = 2**63 - 1  # the native code counts in int64


def shingles(texts: Sequence[str], n: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the word n-grams of each text, in order, including repeated ones.

    Words are runs of letters and digits, ignoring case and Unicode forms (NFKC); in scripts without spaces, each
    character is a word. A text of fewer than n words is one n-gram; a text without words has none.

    Args:
        texts: the texts, N of them.
        n: words per n-gram (default 5).

    Returns:
        hashes [total] uint64, and counts [N] int64, the number of hashes of each text.

    Raises:
        TypeError: not a list of texts. ValueError: n below 1.

    Example:
        >>> hashes, counts = pyqemb.ops.shingles(["one two three", "One, two!"], n=2)
        >>> counts.tolist(), bool(hashes[0] == hashes[2])
        ([2, 1], True)
    """
    n = integer("shingles", "n", n, 1, _MOST)
    texts, text, offsets = _joined("shingles", texts)
    hashes = torch.empty(len(text), dtype=torch.int64)
    counts = torch.empty(len(texts), dtype=torch.int64)
    _C.shingles(text, offsets, hashes, counts, n)
    starts = offsets[:-1]
    rows = torch.repeat_interleave(starts - (counts.cumsum(0) - counts), counts) + torch.arange(int(counts.sum()))
    return hashes[rows].numpy().view(np.uint64), counts.numpy()


def min_hash(texts: Sequence[str], num_hashes: int = 128, n: int = 5) -> np.ndarray:
    """Compute the MinHash signature of each text.

    The fraction of equal entries in two signatures estimates the Jaccard similarity of the sets of word n-grams (those
    of `shingles`), with a standard error of at most 0.5 / sqrt(num_hashes). All bits of the signature of a text without
    words are one.

    Args:
        texts: the texts, N of them.
        num_hashes: the number of hash functions of a signature (default 128).
        n: words per n-gram (default 5).

    Returns:
        [N, num_hashes] uint32.

    Raises:
        TypeError: not a list of texts. ValueError: n or num_hashes below 1.

    Example:
        >>> first, second = pyqemb.ops.min_hash(["the same words here", "The same words, here."], n=2)
        >>> float((first == second).mean())
        1.0

    Source: Broder, On the resemblance and containment of documents (1997).
    """
    num_hashes = integer("min_hash", "num_hashes", num_hashes, 1, 1 << 20)
    n = integer("min_hash", "n", n, 1, _MOST)
    texts, text, offsets = _joined("min_hash", texts)
    signatures = torch.empty((len(texts), num_hashes), dtype=torch.int32)
    _C.min_hash(text, offsets, signatures, n)
    return signatures.numpy().view(np.uint32)


def _joined(op: str, texts: Any) -> tuple[list[str], Tensor, Tensor]:
    if not isinstance(texts, Iterable) or isinstance(texts, str | bytes | Tensor | Mapping | Set):
        raise TypeError(f"[{op}] texts must be a list of texts, got {type(texts).__name__}")
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"[{op}] texts must be a list of texts, got {type(text).__name__} in it")
    parts = [
        (text if text.isascii() else unicodedata.normalize("NFKC", text).lower()).encode("utf-8", "replace")
        for text in texts
    ]
    offsets = torch.zeros(len(parts) + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor([len(part) for part in parts], dtype=torch.int64), 0, out=offsets[1:])
    joined = bytearray().join(parts)
    return texts, torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8), offsets
