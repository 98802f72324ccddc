"""Whatever embeds: pyqemb's own model, or any folder that sentence-transformers loads, behind the same two methods."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.model.config import FAMILIES
from pyqemb.model.embedder import Embedder
from pyqemb.model.portable import CONTRACT, read_contract
from pyqemb.model.reranker import Reranker


class SentenceTransformerEncoder:
    """A sentence-transformers folder, read from the disk alone, safetensors only.

    Its own query prompt is used where it has one; an `instruction` is not, for such models were trained with other templates.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not list(folder.rglob("*.safetensors")):
            raise CheckpointError(f"{folder}: has no .safetensors file; weights in other formats are not read")
        try:
            from sentence_transformers import SentenceTransformer
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{folder}: is not a Qwen3 folder; others need: pip install sentence-transformers"
            ) from error
        self.model = SentenceTransformer(str(folder), local_files_only=True, model_kwargs={"use_safetensors": True})

    def encode_query(self, texts: Sequence[str], instruction: str | None = None) -> np.ndarray:
        """float32 unit vectors [len(texts), E]."""
        return self._vectors(self.model.encode_query, texts)

    def encode_document(self, texts: Sequence[str]) -> np.ndarray:
        """float32 unit vectors [len(texts), E]."""
        return self._vectors(self.model.encode_document, texts)

    def _vectors(self, encode: Any, texts: Sequence[str]) -> np.ndarray:
        vectors = encode(list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)


class UnitEncoder:
    """Unit vectors of an Embedder whose folder asks for others: searches compare by the cosine."""

    def __init__(self, model: Embedder):
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode_query(self, texts: Sequence[str], instruction: str | None = None, dim: int | None = None) -> np.ndarray:
        """float32 unit vectors [len(texts), dim or E]."""
        return self.model.encode_query(texts, instruction=instruction, dim=dim, normalize_embeddings=True)

    def encode_document(self, texts: Sequence[str], dim: int | None = None) -> np.ndarray:
        """float32 unit vectors [len(texts), dim or E]."""
        return self.model.encode_document(texts, dim=dim, normalize_embeddings=True)


def unit_encoder(model: Any) -> Any:
    """The model itself, or one that gives the unit vectors of an Embedder that does not."""
    as_is = not isinstance(model, Embedder) or (model.normalize and model.truncate_dim is None)
    return model if as_is else UnitEncoder(model)


def open_encoder(model: str | Path) -> Embedder | SentenceTransformerEncoder:
    """An Embedder for a Qwen3 folder or a hub id, else what sentence-transformers makes of the folder.

    Raises CheckpointError, naming the file, for a folder that neither can load.
    """
    folder = Path(model)
    ours = (folder / CONTRACT).is_file() or not (folder / "modules.json").is_file()
    if ours or _model_type(folder / "config.json") == "qwen3":
        return Embedder.from_pretrained(model)
    return SentenceTransformerEncoder(folder)


def open_model(folder: str | Path) -> Embedder | Reranker:
    """What pyqemb.json says that a folder holds; an Embedder without one."""
    path = Path(folder)
    reranks = path.is_dir() and read_contract(path).get("kind") == "reranker"
    return Reranker.from_pretrained(folder) if reranks else Embedder.from_pretrained(folder)


def open_reranker(folder: str | Path) -> Callable[[Sequence[tuple[str, str]]], np.ndarray]:
    """Scores of (query, document) pairs by a Reranker folder, or a cross-encoder of sentence-transformers, read from the disk, safetensors
    only.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file() and _model_type(folder / "config.json") in FAMILIES:
        return Reranker.from_pretrained(folder).score
    if not list(folder.rglob("*.safetensors")):
        raise CheckpointError(f"{folder}: has no .safetensors file; weights in other formats are not read")
    try:
        from sentence_transformers import CrossEncoder
    except ModuleNotFoundError as error:
        raise ConfigError(f"{folder}: a reranker needs: pip install sentence-transformers") from error
    model = CrossEncoder(str(folder), local_files_only=True, model_kwargs={"use_safetensors": True})
    return lambda pairs: np.asarray(model.predict(list(pairs), show_progress_bar=False), dtype=np.float32)


def _model_type(path: Path) -> Any:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return config.get("model_type") if isinstance(config, dict) else None
