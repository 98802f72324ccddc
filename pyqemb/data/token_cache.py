"""Token ids of texts, each tokenised once: in memory, or in a folder that later epochs and later runs read."""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from pyqemb.data.batch import PackedBatch
from pyqemb.data.keyed import Keys, keys_of
from pyqemb.data.tokenizer import Tokenizer
from pyqemb.errors import DataError


class TokenCache:
    """Token ids by text, kept in memory."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._ids: dict[str, array] = {}  # an eighth of what lists of int take

    def warm(self, texts: Iterable[str]) -> None:
        """Tokenise what is not there yet, all at once: the tokenizer library then uses every core."""
        new = [text for text in dict.fromkeys(texts) if text not in self._ids]
        for text, ids in zip(new, self.tokenizer.encode_documents(new), strict=True):
            self._ids[text] = array("i", ids)

    def pack(self, texts: Sequence[str]) -> PackedBatch:
        self.warm(texts)
        return PackedBatch.pack([self._ids[text] for text in texts])


class TokenFolder:
    """The same in a folder: `ids` (int32, one text after the other), `ends` and `keys`, written in this order, so that a key's ids are
    always there and whatever a kill has torn is cut off. No text is held in memory.

    Each tokenizer and max_length has a folder of its own inside. One process writes at a time.

    Raises DataError: a folder that cannot be read, a full disk; what it holds stays.
    """

    def __init__(self, tokenizer: Tokenizer, folder: str | Path):
        self.tokenizer, self.folder = tokenizer, Path(folder) / _fingerprint(tokenizer)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            ends = (
                np.fromfile(self.folder / "ends", dtype=np.int64)
                if (self.folder / "ends").exists()
                else np.empty(0, np.int64)
            )
            self._keys = Keys(self.folder / "keys", at_most=len(ends))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.folder}: no cache of tokens that can be used: {error}") from error
        self._ends = _Growing(ends[: self._keys.count])

    def warm(self, texts: Iterable[str]) -> None:
        """Tokenise what is not there yet."""
        distinct = list(dict.fromkeys(texts))
        keys = keys_of(distinct)
        self._tokenise(distinct, keys, self._keys.rows(keys))

    def pack(self, texts: Sequence[str]) -> PackedBatch:
        keys = keys_of(texts)
        rows = self._keys.rows(keys)
        if (rows < 0).any():
            self.warm(texts)
            rows = self._keys.rows(keys)
        ids = np.memmap(self.folder / "ids", dtype=np.int32, mode="r") if len(rows) else np.empty(0, np.int32)
        ends = self._ends.values
        return PackedBatch.pack([ids[ends[row - 1] if row else 0 : ends[row]].tolist() for row in rows.tolist()])

    def _tokenise(self, texts: list[str], keys: np.ndarray, rows: np.ndarray) -> None:
        new = np.flatnonzero(rows < 0)
        if not len(new):
            return
        ids = self.tokenizer.encode_documents([texts[i] for i in new])
        last = int(self._ends.values[-1]) if len(self._ends.values) else 0
        ends = last + np.cumsum([len(each) for each in ids], dtype=np.int64)
        flat = np.fromiter((token for each in ids for token in each), dtype=np.int32, count=int(ends[-1]) - last)
        try:
            for name, data, size in (("ids", flat, 4 * last), ("ends", ends, 8 * self._keys.count)):
                path = self.folder / name
                with path.open("r+b" if path.exists() else "w+b") as file:
                    file.truncate(size)
                    file.seek(0, 2)
                    file.write(data.tobytes())
            self._keys.append(keys[new])
        except OSError as error:
            raise DataError(f"{self.folder}: {error.strerror or error}; the tokens so far are kept") from error
        self._ends.extend(ends)


class _Growing:
    """An array that grows by doubling."""

    def __init__(self, values: np.ndarray):
        self._data, self._count = values, len(values)

    @property
    def values(self) -> np.ndarray:
        return self._data[: self._count]

    def extend(self, more: np.ndarray) -> None:
        if self._count + len(more) > len(self._data):
            self._data = np.concatenate([self.values, np.empty(max(self._count, len(more)), dtype=self._data.dtype)])
        self._data[self._count : self._count + len(more)] = more
        self._count += len(more)


def _fingerprint(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(
        f"{type(tokenizer).__name__} {tokenizer.max_length} {tokenizer.backend.to_str()}".encode()
    ).hexdigest()[:24]
