"""An embedding function for LanceDB, registered as "pyqemb"."""

from typing import Any

from pydantic import PrivateAttr

from pyqemb.errors import ConfigError
from pyqemb.model.embedder import Embedder

try:
    from lancedb.embeddings import EmbeddingFunction, register
except ModuleNotFoundError as error:
    raise ConfigError("lancedb is not installed: pip install lancedb") from error


@register("pyqemb")
class LanceEmbedding(EmbeddingFunction):
    """An embedding function for tables: `LanceEmbedding.create(folder=folder)`.

    A table stores the folder's name and loads the model again; import this module before.
    """

    folder: str
    _model: Embedder = PrivateAttr()

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._model = Embedder.from_pretrained(self.folder)

    def ndims(self) -> int:
        """Return the dimension of a vector."""
        return self._model.get_embedding_dimension()

    def compute_query_embeddings(self, query: str, *args: Any, **options: Any) -> list[Any]:
        """Return the vector of a query, made with the model's query prompt."""
        return [self._model.encode_query(query)]

    def compute_source_embeddings(self, texts: Any, *args: Any, **options: Any) -> list[Any]:
        """Return the vectors of documents: one text, a list, or an Arrow array."""
        texts = [texts] if isinstance(texts, str) else texts
        texts = texts.to_pylist() if hasattr(texts, "to_pylist") else list(texts)
        return list(self._model.encode_document(texts))
