"""A cache of vectors on disk, by the content of the texts and by model."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyqemb.data.blocks import Blocks
from pyqemb.data.keyed import keys_of
from pyqemb.errors import ConfigError, DataError, MachineError
from pyqemb.model.encoder import checked_vectors, unit_encoder
from pyqemb.model.progress import progress_bar

_FORMAT = "vectors-2"
_SETTINGS = (
    "pooling", "attention", "max_seq_length", "prompts", "default_prompt_name", "truncate_dim", "normalize",
)  # fmt: skip
_CHUNK = 4096  # texts encoded between two writes, which a killed process can lose


class CachedEncoder:
    """A wrapper of a model that caches its vectors in a folder, memory-mapped; other attributes are the model's.

    Each model (by its weights), side (query or document) and instruction has a separate subfolder with checksummed
    blocks of vectors (`data/blocks.py`). A killed job continues after the last finished chunk. Several processes may
    share a folder. Damaged vectors are recomputed.

    Raises:
        ConfigError: a model without parameters and without an attribute `fingerprint`. DataError: the folder has
            vectors of another dimension.
        MachineError: the folder cannot be read or written, or its disk is full; finished chunks are kept.
    """

    def __init__(self, model: Any, folder: str | Path):
        self.model, self._folder, self._fingerprint = unit_encoder(model), Path(folder), fingerprint(model)
        self._stores: dict[Path, Blocks] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode_query(self, texts: Sequence[str], instruction: str | None = None) -> np.ndarray:
        """Return the model's query vectors, float32 [N, E]; texts that the folder has are not encoded again."""
        used = getattr(self.model, "default_instruction", None) if instruction is None else instruction
        return self._vectors("query", used, texts, lambda some: self.model.encode_query(some, instruction=instruction))

    def encode_document(self, texts: Sequence[str]) -> np.ndarray:
        """Return the model's document vectors, float32 [N, E]; texts that the folder has are not encoded again."""
        return self._vectors("document", None, texts, self.model.encode_document)

    def _vectors(self, side: str, instruction: str | None, texts: Sequence[str], encode: Any) -> np.ndarray:
        """float32 [N, E]; memory-mapped if the texts are stored in this order."""
        identity = json.dumps([_FORMAT, self._fingerprint, side, instruction])
        folder = self._folder / f"{side}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}"
        if folder not in self._stores:
            self._stores[folder] = Blocks(folder, identity)
        store = self._stores[folder]
        keys = keys_of(texts)
        first = np.sort(np.unique(keys, return_index=True)[1])
        new = first[store.rows(keys[first]) < 0]
        with progress_bar("Texts", len(new)) as advance:
            for part in chunks(len(new), _CHUNK):
                some = new[part]
                if len(some := some[store.rows(keys[some]) < 0]):  # another process may have encoded them meanwhile
                    vectors = checked_vectors(encode([texts[i] for i in some]), len(some), "texts")
                    _append(store, keys[some], vectors.astype("<f4", copy=False))
                advance(part.stop - part.start)
        if not len(keys):
            return np.empty((0, (store.width or 0) // 4), dtype=np.float32)
        rows = store.rows(keys)
        if (rows < 0).any():
            raise MachineError(f"{folder}: lost data that was just written to it")
        return store.matrix(rows).view("<f4")


def _append(store: Blocks, keys: np.ndarray, vectors: np.ndarray) -> None:
    width = 4 * vectors.shape[1]
    if store.width not in (None, width):
        raise DataError(
            f"{store.folder}: holds vectors of {store.width // 4} features, the model gives {vectors.shape[1]}"
        )
    try:
        store.append(keys, vectors, np.full(len(keys), width), align=width)
    except MachineError as error:
        raise MachineError(f"{error}; the {len(store)} vectors so far are kept") from error


def fingerprint(model: Any) -> str:
    """A hash of the weights and all settings that the vectors depend on; `model.fingerprint` if it exists."""
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
    digest.update(settings_digest(model).encode())
    return digest.hexdigest()


def settings_digest(model: Any) -> str:
    """A hash of what the vectors depend on besides the weights, which may be on the meta device.

    It covers the configuration of the decoder, the tokenizer, the pooling and the prompts.
    """
    inner: Any = model if hasattr(model, "state_dict") else getattr(model, "model", None)
    digest = hashlib.blake2b(digest_size=16)
    for name in _SETTINGS:
        digest.update(f"{name} {getattr(model, name, None)!r} {getattr(inner, name, None)!r}".encode())
    configs = {id(config): config for module in inner.modules() if (config := getattr(module, "config", None))}
    for config in configs.values():
        values = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    tokenizer = getattr(model, "tokenizer", None) or getattr(inner, "tokenizer", None)
    digest.update(f"{getattr(tokenizer, 'max_length', None)}".encode())
    backends = (getattr(tokenizer, name, None) for name in ("backend", "backend_tokenizer"))  # pyqemb's, transformers'
    fast = next((backend for backend in backends if hasattr(backend, "to_str")), None)
    if fast is not None:
        digest.update(fast.to_str().encode())
    elif tokenizer is not None and hasattr(tokenizer, "get_vocab"):  # written in Python
        digest.update(json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]).encode())
    return digest.hexdigest()


def chunks(count: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover range(count)."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
