"""Where a text is in a file that grows: 16-byte content hashes, found by binary search, 24 bytes of memory each."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

KEY = np.dtype("S16")


def keys_of(texts: Iterable[str]) -> np.ndarray:
    """blake2b of each text, S16 [N]."""
    return np.array([_key(text) for text in texts], dtype=KEY)


class Keys:
    """The rows of the keys of a file, in the order in which they came. `append` writes; a torn last key is cut off."""

    def __init__(self, path: Path, at_most: int | None = None):
        self.path = path
        raw = np.fromfile(path, dtype=np.uint8) if path.exists() else np.empty(0, dtype=np.uint8)
        self.count = len(raw) // 16 if at_most is None else min(len(raw) // 16, at_most)
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []  # (keys, sorted; their rows), each longer than the next
        self._add(raw[: 16 * self.count].view(KEY), 0)

    def rows(self, keys: np.ndarray) -> np.ndarray:
        """int64 [N], -1 for those that are not there."""
        rows = np.full(len(keys), -1, dtype=np.int64)
        for known, places in self._runs:
            at = np.searchsorted(known, keys).clip(max=len(known) - 1)
            found = known[at] == keys
            rows[found] = places[at[found]]
        return rows

    def append(self, keys: np.ndarray) -> None:
        """Distinct keys that are not there yet; OSError where the disk is full, and nothing is added then."""
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.truncate(16 * self.count)
            file.seek(0, 2)
            file.write(keys.tobytes())
        self._add(keys, self.count)
        self.count += len(keys)

    def _add(self, keys: np.ndarray, start: int) -> None:
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        self._runs.append((keys[order], start + order))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            (a, first), (b, second) = self._runs[-2:]
            both, rows = np.concatenate([a, b]), np.concatenate([first, second])
            order = np.argsort(both, kind="stable")
            self._runs[-2:] = [(both[order], rows[order])]


def _key(text: str) -> bytes:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return digest[:-1] + bytes([digest[-1] | 1])  # numpy's S16 drops zeros at the end
