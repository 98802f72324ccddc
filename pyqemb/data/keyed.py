"""An index of texts in a growing store, by 16-byte content hashes and binary search; 24 bytes of memory each."""

import hashlib
from collections.abc import Iterable

import numpy as np

KEY = np.dtype("S16")


def keys_of(texts: Iterable[str]) -> np.ndarray:
    """blake2b of each text, S16 [N]."""
    return np.array([_key(text) for text in texts], dtype=KEY)


class Keys:
    """The row of each key; rows are numbered in the order of adding keys. For equal keys the last one counts."""

    def __init__(self) -> None:
        self.count = 0
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []  # (keys, sorted; their rows), each longer than the next

    def rows(self, keys: np.ndarray) -> np.ndarray:
        """int64 [N], -1 for unknown keys."""
        rows = np.full(len(keys), -1, dtype=np.int64)
        for known, places in self._runs:
            at = np.searchsorted(known, keys, side="right") - 1
            found = (at >= 0) & (known[at] == keys)
            rows[found] = places[at[found]]
        return rows

    def add(self, keys: np.ndarray) -> None:
        """Add keys, which must be distinct."""
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        self._runs.append((keys[order], self.count + order))
        self.count += len(keys)
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            (a, first), (b, second) = self._runs[-2:]
            both, rows = np.concatenate([a, b]), np.concatenate([first, second])
            order = np.argsort(both, kind="stable")  # stable: the later of two equal keys stays after the earlier
            self._runs[-2:] = [(both[order], rows[order])]


def _key(text: str) -> bytes:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return digest[:-1] + bytes([digest[-1] | 1])  # numpy's S16 strips trailing zeros
