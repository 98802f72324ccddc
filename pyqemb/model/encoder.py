"""One interface for pyqemb's models and for folders that sentence-transformers loads."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pyqemb.data.folder import read_object
from pyqemb.errors import CheckpointError, ConfigError, DataError
from pyqemb.model.embedder import Embedder
from pyqemb.model.families import FAMILIES
from pyqemb.model.reranker import Reranker
from pyqemb.model.safety import check_safe
from pyqemb.model.sentence import CONTRACT, check_kind, kind_of
from pyqemb.model.source import local_folder

Encoder = TypeVar("Encoder")
_ROWS = 8192  # checked at a time


class SentenceTransformerEncoder:
    """A sentence-transformers folder; weights are read from local safetensors files only.

    Its query prompt is used if it has one. An `instruction` is ignored, because such models were trained with other
    templates.
    """

    def __init__(self, folder: str | Path, device: str | None = None):
        folder = Path(folder)
        if not list(folder.rglob("*.safetensors")):
            raise CheckpointError(f"{folder}: has no .safetensors file; weights in other formats are not read")
        check_safe(folder)
        try:
            from sentence_transformers import SentenceTransformer
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{folder}: is not a Qwen3 folder; others need: pip install sentence-transformers"
            ) from error
        self.model = SentenceTransformer(
            str(folder), device=device, local_files_only=True, model_kwargs={"use_safetensors": True}
        )

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
    """Unit vectors of an Embedder without normalization, for searches by cosine."""

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


def unit_encoder(model: Encoder) -> "Encoder | UnitEncoder":
    """The model itself, or a wrapper that returns unit vectors if the Embedder does not."""
    if isinstance(model, Embedder) and not (model.normalize and model.truncate_dim is None):
        return UnitEncoder(model)
    return model


def checked_vectors(vectors: Any, count: int, what: str) -> np.ndarray:
    """float32 [count, E]: what a model returned for texts.

    Raises:
        DataError: it is not one vector for each text, or a value is not finite.
    """
    found = np.asarray(vectors)
    if found.ndim != 2 or len(found) != count or found.dtype.kind != "f":
        raise DataError(
            f"the model gives an array of {found.dtype} with the shape {found.shape} for {count} {what}, expected "
            f"floating-point numbers with the shape ({count}, features)"
        )
    if not all(np.isfinite(found[first : first + _ROWS]).all() for first in range(0, count, _ROWS)):
        raise DataError(f"the model gives NaN or infinity for {what}")
    return np.ascontiguousarray(found, dtype=np.float32)


def open_encoder(model: str | Path, device: str | None = None) -> Embedder | SentenceTransformerEncoder:
    """An Embedder for a Qwen3 folder or a hub id, else the model that sentence-transformers loads.

    It is on `device` (default: a GPU if there is one).

    Raises CheckpointError, which names the file, for a folder that neither can load.
    """
    folder = Path(model)
    if folder.is_dir():
        check_kind(folder, "embedder")
    ours = (folder / CONTRACT).is_file() or not (folder / "modules.json").is_file()
    if ours or _model_type(folder) == "qwen3":
        return Embedder.from_pretrained(model, device=device)
    return SentenceTransformerEncoder(folder, device)


def open_model(folder: str | Path, device: str | None = None) -> Embedder | Reranker:
    """A Reranker if the folder holds one, else an Embedder."""
    reranks = kind_of(local_folder(folder)) == "reranker"
    return (
        Reranker.from_pretrained(folder, device=device) if reranks else Embedder.from_pretrained(folder, device=device)
    )


def open_reranker(folder: str | Path) -> Callable[[Sequence[tuple[str, str]]], np.ndarray]:
    """Open a reranker folder as a function that scores (query, document) pairs: float32 [number of pairs].

    The folder holds a Reranker, or a cross-encoder of sentence-transformers; the weights are read from the disk, from
    safetensors files only.

    Raises:
        CheckpointError: the folder is not a reranker, is unsafe to open, or has no safetensors file.
        ConfigError: a cross-encoder needs sentence-transformers, which is not installed.
    """
    folder = Path(folder)
    check_kind(folder, "reranker")
    family = FAMILIES.get(str(_model_type(folder)))
    if family is not None and not family.config.is_encoder:
        return Reranker.from_pretrained(folder).score
    check_safe(folder)
    if not list(folder.rglob("*.safetensors")):
        raise CheckpointError(f"{folder}: has no .safetensors file; weights in other formats are not read")
    try:
        from sentence_transformers import CrossEncoder
    except ModuleNotFoundError as error:
        raise ConfigError(f"{folder}: a reranker needs: pip install sentence-transformers") from error
    model = CrossEncoder(str(folder), local_files_only=True, model_kwargs={"use_safetensors": True})
    return lambda pairs: np.asarray(model.predict(list(pairs), show_progress_bar=False), dtype=np.float32)


def _model_type(folder: Path) -> Any:
    return read_object(folder, "config.json").get("model_type")
