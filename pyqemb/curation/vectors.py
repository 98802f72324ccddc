"""Vectors kept on disk by the content of their texts and by model, so that nothing is ever embedded twice."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyqemb.data.files import atomic_file
from pyqemb.data.keyed import Keys, keys_of
from pyqemb.errors import ConfigError, DataError

_CHUNK = 4096  # texts embedded between two writes: what a kill can cost


class CachedEncoder:
    """A model whose vectors are kept in a folder, memory-mapped. Same methods as the model's; also what it has besides.

    Each model (by its weights), side and instruction has a folder of its own with vectors.f32 and keys (blake2b of each text). A killed job
    goes on behind the last finished chunk.

    Raises:
        ConfigError: a model without parameters and without an attribute `fingerprint`. DataError: a folder of vectors of another dimension,
        a full disk; finished chunks are kept.
    """

    def __init__(self, model: Any, folder: str | Path):
        self.model, self._folder, self._fingerprint = model, Path(folder), fingerprint(model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode_query(self, texts: Sequence[str], instruction: str | None = None) -> np.ndarray:
        told = getattr(self.model, "default_instruction", None) if instruction is None else instruction
        return self._vectors("query", told, texts, lambda some: self.model.encode_query(some, instruction=instruction))

    def encode_document(self, texts: Sequence[str]) -> np.ndarray:
        return self._vectors("document", None, texts, self.model.encode_document)

    def _vectors(self, side: str, told: str | None, texts: Sequence[str], encode: Any) -> np.ndarray:
        """float32 [N, E]; mapped from the disk where the texts lie there in this order."""
        digest = hashlib.sha256(json.dumps([self._fingerprint, side, told]).encode()).hexdigest()[:24]
        store = _Store(
            self._folder / f"{side}-{digest}", {"model": self._fingerprint, "side": side, "instruction": told}
        )
        keys = keys_of(texts)
        first = np.sort(np.unique(keys, return_index=True)[1])
        new = first[store.keys.rows(keys[first]) < 0]
        for start in range(0, len(new), _CHUNK):
            some = new[start : start + _CHUNK]
            store.append(keys[some], np.asarray(encode([texts[i] for i in some]), dtype=np.float32))
        return store.read(store.keys.rows(keys))


class _Store:
    """vectors.f32 and keys, appended to in this order, so that a key's vector is always there."""

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self._folder, self._facts = folder, facts
        self.dim: int | None = None
        whole = 0
        if (folder / "manifest.json").exists():
            try:
                self.dim = int(json.loads((folder / "manifest.json").read_text())["dim"])
                whole = (folder / "vectors.f32").stat().st_size // (4 * self.dim)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"{folder}: no cache of vectors that can be read: {error}") from error
        self.keys = Keys(folder / "keys", at_most=whole)

    def append(self, keys: np.ndarray, vectors: np.ndarray) -> None:
        dim = vectors.shape[1]
        if self.dim is not None and self.dim != dim:
            raise DataError(f"{self._folder}: holds vectors of {self.dim} features, the model gives {dim}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / "vectors.f32"
            with path.open("r+b" if path.exists() else "w+b") as file:
                file.truncate(4 * dim * self.keys.count)
                file.seek(0, 2)
                file.write(vectors.tobytes())
            if self.dim is None:
                with atomic_file(self._folder / "manifest.json") as manifest:
                    manifest.write_text(json.dumps({"dim": dim, **self._facts}, indent=1) + "\n")
                self.dim = dim
            self.keys.append(keys)
        except OSError as error:
            raise DataError(
                f"{self._folder}: {error.strerror or error}; the {self.keys.count} vectors so far are kept"
            ) from error

    def read(self, rows: np.ndarray) -> np.ndarray:
        if not len(rows):
            return np.empty((0, self.dim or 0), dtype=np.float32)
        assert self.dim is not None
        mapped = np.memmap(self._folder / "vectors.f32", dtype=np.float32, mode="c", shape=(self.keys.count, self.dim))
        first = int(rows[0])
        if np.array_equal(rows, np.arange(first, first + len(rows))):
            return mapped[first : first + len(rows)]
        return mapped[rows]


def fingerprint(model: Any) -> str:
    """A hash of a model's weights and of what else its vectors depend on; `model.fingerprint` where it has one."""
    own = getattr(model, "fingerprint", None)
    if own is not None:
        return str(own)
    inner: Any = model if hasattr(model, "state_dict") else getattr(model, "model", None)
    if not hasattr(inner, "state_dict"):
        raise ConfigError(
            f"a cache of vectors needs a model with weights or an attribute fingerprint, got {type(model).__name__}"
        )
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in inner.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for name in ("pooling", "attention", "max_seq_length", "prompts"):
        digest.update(f"{name} {getattr(model, name, None)} {getattr(inner, name, None)}".encode())
    tokenizer = getattr(model, "tokenizer", None)
    digest.update(f"{getattr(tokenizer, 'max_length', None)}".encode())
    return digest.hexdigest()


def chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
