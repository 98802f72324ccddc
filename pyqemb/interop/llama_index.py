"""An embedding model for LlamaIndex."""

import asyncio
from typing import Any

from pydantic import PrivateAttr

from pyqemb.errors import ConfigError
from pyqemb.model.embedder import Embedder

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding
except ModuleNotFoundError as error:
    raise ConfigError("llama-index-core is not installed: pip install llama-index-core") from error


class LlamaIndexEmbedding(BaseEmbedding):
    """`VectorStoreIndex.from_documents(documents, embed_model=LlamaIndexEmbedding(model))`."""

    _model: Embedder = PrivateAttr()

    def __init__(self, model: Embedder, **options: Any):
        super().__init__(**options)
        self._model = model

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._model.embed_query(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await self._model.aembed_query(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._model.embed_documents([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._model.embed_documents(texts)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await self._model.aembed_documents(texts)
