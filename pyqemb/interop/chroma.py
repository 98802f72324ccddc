"""An embedding function for Chroma."""

from typing import Any, Literal

import numpy as np

from pyqemb.errors import ConfigError
from pyqemb.model.embedder import Embedder

try:
    from chromadb import Documents, EmbeddingFunction
    from chromadb.utils.embedding_functions import register_embedding_function
except ModuleNotFoundError as error:
    raise ConfigError("chromadb is not installed: pip install chromadb") from error


@register_embedding_function
class ChromaEmbedding(EmbeddingFunction[Documents]):
    """An embedding function for `create_collection(name, embedding_function=ChromaEmbedding(folder))`.

    A collection stores the folder's name and loads the model again.
    """

    def __init__(self, folder: str):
        self.folder, self.model = str(folder), Embedder.from_pretrained(folder)

    def __call__(self, input: Documents) -> list[np.ndarray]:
        """Return the vectors of documents."""
        return list(self.model.encode_document(input))

    def embed_query(self, input: Documents) -> list[np.ndarray]:
        """Return the vectors of queries, made with the model's query prompt."""
        return list(self.model.encode_query(input))

    @staticmethod
    def name() -> str:
        """Return the name under which Chroma registers this embedding function."""
        return "pyqemb"

    def default_space(self) -> Literal["cosine"]:
        """Return the distance of new collections."""
        return "cosine"

    def get_config(self) -> dict[str, Any]:
        """Return the configuration that a collection stores to load the model again: its folder."""
        return {"folder": self.folder}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> "ChromaEmbedding":
        """Load the model that `get_config` describes."""
        return ChromaEmbedding(config["folder"])
