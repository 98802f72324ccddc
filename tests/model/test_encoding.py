"""What sentence-transformers' users pass to encode; windows, precisions, prompts, progress."""

import numpy as np
import pytest
import torch

from pyqemb.errors import ConfigError
from pyqemb.model import encoding
from pyqemb.model.quantize import quantize, value_ranges
from pyqemb.testing.tiny import TEXTS, tiny_embedder


@pytest.fixture
def model():
    model = tiny_embedder()
    model.prompts = {"query": "Q: ", "document": "", "code": "def "}
    return model


def test_windows_change_nothing(model, monkeypatch):
    texts = [f"{text} {i}" for i in range(5) for text in TEXTS]
    whole, seen = model.encode(texts), []
    monkeypatch.setattr(encoding, "_TEXTS_AT_ONCE", 7)
    assert np.abs(model.encode(texts, on_progress=seen.append) - whole).max() < 1e-6
    assert seen == [*range(7, 50, 7), 50]
    assert model.encode([]).shape == (0,)


def test_tokens_come_from_another_thread(model, monkeypatch):
    import threading

    monkeypatch.setattr(encoding, "_TEXTS_AT_ONCE", 4)
    real, threads = model.tokenizer.encode_documents, []

    def watched(texts):
        threads.append(threading.get_ident())
        return real(texts)

    monkeypatch.setattr(model.tokenizer, "encode_documents", watched)
    model.encode(TEXTS)
    assert len(threads) == 3
    assert threading.get_ident() not in threads


def test_prompts(model):
    wanted = model.encode(["Q: " + text for text in TEXTS])
    for found in (
        model.encode_query(TEXTS),
        model.encode(TEXTS, prompt_name="query"),
        model.encode(TEXTS, prompt="Q: "),
    ):
        assert np.array_equal(found, wanted)
    assert np.array_equal(model.encode_document(TEXTS), model.encode(TEXTS))
    assert np.array_equal(
        model.encode_document(TEXTS, prompt_name="code"), model.encode(["def " + text for text in TEXTS])
    )
    assert np.array_equal(model.encode_query(TEXTS, instruction="Find"), model.encode(TEXTS, instruction="Find"))
    with pytest.raises(ConfigError, match="prompt_name must be one of query, document, code, got 'sts'"):
        model.encode(TEXTS, prompt_name="sts")
    with pytest.raises(ConfigError, match="exclude each other"):
        model.encode_query(TEXTS, instruction="Find", prompt="Q")


def test_the_verbs_of_sentence_transformers(model):
    plain = model.encode(TEXTS)
    options = dict(batch_size=3, show_progress_bar=False, normalize_embeddings=True, convert_to_numpy=True)
    assert np.array_equal(model.encode(TEXTS, **options), plain)
    tensor = model.encode(TEXTS, convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    assert np.array_equal(tensor.numpy(), plain)
    assert model.encode("x", convert_to_tensor=True).shape == (32,)
    assert np.array_equal(model.encode(TEXTS, truncate_dim=8), plain[:, :8])
    assert np.array_equal(model.encode(TEXTS, truncate_dim=8, normalize_embeddings=True), model.encode(TEXTS, dim=8))
    assert model.get_embedding_dimension() == model.get_sentence_embedding_dimension() == 32
    assert model.max_seq_length == model.tokenizer.max_length
    with pytest.raises(TypeError, match="unexpected keyword argument 'normalise'"):
        model.encode(TEXTS, normalise=True)


def test_langchain_calls_it(model):
    assert model.embed_query("x") == model.encode_query("x").tolist()
    assert model.embed_documents(["x", "y"]) == model.encode_document(["x", "y"]).tolist()


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_precisions_are_those_of_sentence_transformers(model, precision):
    util = pytest.importorskip("sentence_transformers.util.quantization")
    vectors = np.random.default_rng(0).standard_normal((300, 45)).astype(np.float32)
    theirs = util.quantize_embeddings(vectors, precision)
    found = quantize(vectors, precision)
    assert found.dtype == theirs.dtype
    assert np.array_equal(found, theirs)
    ranges = value_ranges(vectors)
    some = util.quantize_embeddings(vectors[:9], precision, ranges=ranges)
    assert np.array_equal(quantize(vectors[:9], precision, ranges), some)
    assert np.array_equal(model.encode(TEXTS, precision=precision), quantize(model.encode(TEXTS), precision))


def test_steps_are_small_enough():
    vectors = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
    low, high = ranges = value_ranges(vectors)
    back = (quantize(vectors, "uint8", ranges) + 0.5) * (high - low) / 255 + low
    assert np.abs(back - vectors).max() <= 0.51 * (high - low).max() / 255
    assert np.array_equal(
        quantize(vectors[:1] * 100, "int8", ranges), np.where(vectors[:1] > 0, 127, -128).astype(np.int8)
    )


def test_what_is_refused(model):
    with pytest.raises(ConfigError, match="precision must be one of float32, int8, uint8, binary, ubinary, got 'int4'"):
        model.encode(TEXTS, precision="int4")
    with pytest.raises(ConfigError, match=r"ranges must have shape \[2, 4\], got \[1, 4\]"):
        quantize(np.ones((3, 4), np.float32), "int8", np.ones((1, 4)))
    assert quantize(np.ones((2, 4), np.float32), "uint8").tolist() == [[0] * 4] * 2  # no range at all
