"""A cache of token ids: in memory, or in a folder for later epochs and runs."""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from pyqemb.data.batch import PackedBatch
from pyqemb.data.blocks import Blocks
from pyqemb.data.keyed import keys_of
from pyqemb.data.tokenizer import Tokenizer
from pyqemb.errors import MachineError

_FORMAT = "tokens-2"


class TokenCache:
    """Token ids by text, kept in memory."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._ids: dict[str, array] = {}  # an eighth of the memory of lists of int

    def warm(self, texts: Iterable[str]) -> None:
        """Tokenize the new texts in one call, so that the tokenizer library uses every core."""
        new = [text for text in dict.fromkeys(texts) if text not in self._ids]
        for text, ids in zip(new, self.tokenizer.encode_documents(new), strict=True):
            self._ids[text] = array("i", ids)

    def pack(self, texts: Sequence[str]) -> PackedBatch:
        """Return the token ids of the texts as one batch; new texts are tokenized first."""
        self.warm(texts)
        return PackedBatch.pack([self._ids[text] for text in texts])


class TokenFolder:
    """Token ids by text, in a folder of checksummed blocks (`data/blocks.py`). Texts are not held in memory.

    Each tokenizer and max_length has a separate subfolder. Several processes may share it, and each reads what the
    others have tokenized. Damage is detected when a text is read, and the text is tokenized again.

    Raises MachineError: the folder cannot be read or written, or its disk is full. Its content is kept.
    """

    def __init__(self, tokenizer: Tokenizer, folder: str | Path):
        self.tokenizer = tokenizer
        fingerprint = _fingerprint(tokenizer)
        self.folder = Path(folder) / fingerprint
        self._blocks = Blocks(self.folder, fingerprint)

    def warm(self, texts: Iterable[str]) -> None:
        """Tokenize the new texts."""
        distinct = list(dict.fromkeys(texts))
        keys = keys_of(distinct)
        new = np.flatnonzero(self._blocks.rows(keys) < 0)
        if not len(new):
            return
        ids = self.tokenizer.encode_documents([distinct[i] for i in new])
        lengths = np.array([len(each) for each in ids], dtype=np.int64)
        flat = np.fromiter((token for each in ids for token in each), dtype=np.int32, count=int(lengths.sum()))
        try:
            self._blocks.append(keys[new], flat, 4 * lengths, align=4)
        except MachineError as error:
            raise MachineError(f"{error}; the tokens so far are kept") from error

    def pack(self, texts: Sequence[str]) -> PackedBatch:
        """Return the token ids of the texts as one batch; new texts are tokenized first.

        Raises:
            MachineError: the folder cannot be read or written.
        """
        keys = keys_of(texts)
        rows = self._blocks.rows(keys)
        if (rows < 0).any():
            self.warm(texts)
            rows = self._blocks.rows(keys)
        if (rows < 0).any():
            raise MachineError(f"{self.folder}: lost data that was just written to it")
        return PackedBatch.pack([ids.tolist() for ids in self._blocks.values(rows, np.int32)])


def _fingerprint(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(
        f"{_FORMAT} {type(tokenizer).__name__} {tokenizer.max_length} {tokenizer.backend.to_str()}".encode()
    ).hexdigest()[:24]
