"""A shuffled order of any length without memory: a pseudorandom permutation of [0, n), given by a seed."""

import numpy as np

_ROUNDS = 6


class Order:
    """`order(places)`: int64 places -> int64 rows.

    A Feistel network on 2b bits, applied repeatedly until the value is in [0, n) (cycle walking).
    """

    def __init__(self, count: int, generator: np.random.Generator):
        self._count, self._bits = count, max(1, (max(count - 1, 1).bit_length() + 1) // 2)
        self._keys = generator.integers(0, 2**64, _ROUNDS, dtype=np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Return the row at each place: int64 places in [0, n) -> int64 rows."""
        found = self._shuffled(np.asarray(places, dtype=np.uint64))
        while (outside := found >= self._count).any():
            found[outside] = self._shuffled(found[outside])
        return found.astype(np.int64)

    def _shuffled(self, values: np.ndarray) -> np.ndarray:
        bits = np.uint64(self._bits)
        mask = np.uint64((1 << self._bits) - 1)
        left, right = values >> bits, values & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return (left << bits) | right


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
