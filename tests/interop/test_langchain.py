"""LangChain's standard tests on an Embedder."""

import subprocess
import sys

import pytest

pytest.importorskip("langchain_tests")
from langchain_core.embeddings import Embeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from pyqemb import Embedder
from pyqemb.testing.tiny import tiny_embedder


class Params:
    @property
    def embeddings_class(self):
        return Embedder

    @property
    def embedding_model_params(self):
        model = tiny_embedder()
        return {"model": model.model, "tokenizer": model.tokenizer}


class TestUnit(Params, EmbeddingsUnitTests):
    pass


@pytest.mark.asyncio
class TestIntegration(Params, EmbeddingsIntegrationTests):
    pass


def test_it_is_one_of_langchains_embeddings():
    from langchain_core.vectorstores import InMemoryVectorStore

    model = tiny_embedder()
    assert isinstance(model, Embeddings)
    found = InMemoryVectorStore.from_texts(["a b", "x y"], embedding=model).similarity_search("x y", k=2)
    assert len(found) == 2
    assert model.embed_documents([]) == []


def test_langchain_is_not_imported():
    code = "import sys, pyqemb; pyqemb.Embedder; assert not [name for name in sys.modules if 'langchain' in name]"
    subprocess.run([sys.executable, "-c", code], check=True)
