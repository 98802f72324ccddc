"""The cache of vectors: what is encoded again, and for what it has folders of their own."""

import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers.normalizers import Lowercase

from pyqemb.data.blocks import Blocks
from pyqemb.errors import ConfigError, DataError, MachineError
from pyqemb.model import cached_encoder as module
from pyqemb.model.cached_encoder import CachedEncoder, chunks, fingerprint
from pyqemb.model.encoder import UnitEncoder
from pyqemb.testing.tiny import tiny_embedder


class Model:
    """Its vectors are lengths, and it notes what it encodes."""

    fingerprint = "model"
    default_instruction = "default"

    def __init__(self, width=2):
        self.width, self.calls = width, []

    def encode_query(self, texts, instruction=None):
        self.calls.append(("query", list(texts), instruction))
        return np.array([[len(text), -1] for text in texts], dtype=np.float64)

    def encode_document(self, texts):
        self.calls.append(("document", list(texts)))
        return np.array([[len(text)] * self.width for text in texts], dtype=np.float64)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 3)


def test_each_text_is_encoded_once_in_its_order(tmp_path):
    model = Model()
    cache = CachedEncoder(model, str(tmp_path))
    texts = ["a", "bb", "ccc", "a", "dddd", "", "bb"]
    found = cache.encode_document(texts)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[len(text)] * 2 for text in texts])
    assert model.calls == [("document", ["a", "bb", "ccc"]), ("document", ["dddd", ""])]
    model.calls.clear()
    again = CachedEncoder(model, tmp_path)
    np.testing.assert_array_equal(again.encode_document(["", "e" * 5, "ccc"]), [[0, 0], [5, 5], [3, 3]])
    assert model.calls == [("document", ["e" * 5])]
    assert isinstance(again.encode_document(texts[:3]), np.memmap)


def test_queries_have_a_folder_for_each_instruction(tmp_path):
    model = Model()
    cache = CachedEncoder(model, tmp_path)
    for instruction in (None, "default", "other", None):
        np.testing.assert_array_equal(cache.encode_query(["aa"], instruction=instruction), [[2, -1]])
    cache.encode_document(["aa"])
    assert model.calls == [
        ("query", ["aa"], None),  # the default
        ("query", ["aa"], "other"),
        ("document", ["aa"]),
    ]
    identities = [
        json.dumps(["vectors-2", "model", *which])
        for which in (("query", "default"), ("query", "other"), ("document", None))
    ]
    sides = "query", "query", "document"
    names = {
        f"{side}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}"
        for side, identity in zip(sides, identities, strict=True)
    }
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_model_without_a_default_instruction(tmp_path):
    plain = SimpleNamespace(fingerprint="plain", encode_query=lambda texts, instruction: np.ones((len(texts), 1)))
    np.testing.assert_array_equal(CachedEncoder(plain, tmp_path).encode_query(["a"]), [[1]])
    (folder,) = tmp_path.iterdir()
    identity = json.dumps(["vectors-2", "plain", "query", None])
    assert folder.name == f"query-{hashlib.sha256(identity.encode()).hexdigest()[:24]}"


def test_no_texts(tmp_path):
    model = Model()
    cache = CachedEncoder(model, tmp_path)
    found = cache.encode_document([])
    assert (found.shape, found.dtype) == ((0, 0), np.float32)
    cache.encode_document(["a"])
    assert cache.encode_document([]).shape == (0, 2)
    assert len(model.calls) == 1


def test_other_attributes_are_the_models(tmp_path):
    model = Model()
    cache = CachedEncoder(model, tmp_path)
    assert cache.calls is model.calls
    with pytest.raises(AttributeError, match="absent"):
        _ = cache.absent
    embedder = tiny_embedder()
    assert CachedEncoder(embedder, tmp_path).model is embedder
    embedder.normalize = False
    assert isinstance(CachedEncoder(embedder, tmp_path).model, UnitEncoder)


def test_texts_that_another_process_has_encoded_meanwhile(tmp_path):
    class Racing(Model):
        def encode_document(self, texts):
            if not self.calls:
                CachedEncoder(Model(), tmp_path).encode_document(["c", "d", "e", "f"])
            return super().encode_document(texts)

    model = Racing()
    found = CachedEncoder(model, tmp_path).encode_document(["a", "b", "c", "d", "e", "f", "gg"])
    np.testing.assert_array_equal(found[:, 0], [1] * 6 + [2])
    assert model.calls == [("document", ["a", "b", "c"]), ("document", ["gg"])]


def test_the_progress_counts_the_new_texts(tmp_path, monkeypatch):
    from contextlib import contextmanager

    seen = []

    @contextmanager
    def progress_bar(name, total):
        seen.append((name, total))
        yield seen.append

    monkeypatch.setattr(module, "progress_bar", progress_bar)
    cache = CachedEncoder(Model(), tmp_path)
    cache.encode_document(["a"])
    cache.encode_document([*"abcde"])
    assert seen == [("Texts", 1), 1, ("Texts", 4), 3, 1]


def test_another_width_is_refused(tmp_path):
    CachedEncoder(Model(), tmp_path).encode_document(["a"])
    (folder,) = tmp_path.iterdir()
    with pytest.raises(DataError) as caught:
        CachedEncoder(Model(3), tmp_path).encode_document(["b"])
    assert str(caught.value) == f"{folder}: holds vectors of 2 features, the model gives 3"


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (np.ones((1, 3)), r"shape \(1, 3\) for 2 texts"),
        (np.ones((2, 3), dtype=np.int8), "array of int8"),
        (np.full((2, 3), np.nan), "NaN or infinity for texts"),
    ],
)
def test_what_is_no_vector_for_each_text_is_refused_and_not_kept(tmp_path, vectors, words):
    model = Model()
    model.encode_document = lambda texts: vectors
    with pytest.raises(DataError, match=words):
        CachedEncoder(model, tmp_path).encode_document(["a", "b"])
    assert len(CachedEncoder(Model(), tmp_path).encode_document(["a", "b"])) == 2


def test_a_full_disk_keeps_the_chunks_before(tmp_path, monkeypatch):
    cache = CachedEncoder(Model(), tmp_path)
    real = Blocks.append

    def append(self, keys, *rest, align):
        if len(self) == 3:
            raise MachineError("it is full", 28)
        real(self, keys, *rest, align=align)

    with monkeypatch.context() as patch:
        patch.setattr(Blocks, "append", append)
        with pytest.raises(MachineError, match=r"^it is full; the 3 vectors so far are kept$"):
            cache.encode_document([*"abcdef"])
    cache.model.calls.clear()
    cache.encode_document([*"abcdef"])
    assert cache.model.calls == [("document", ["d", "e", "f"])]


def test_a_loss_right_after_writing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Blocks, "append", lambda *_, **__: None)
    with pytest.raises(MachineError, match=r"document-[0-9a-f]{24}: lost data that was just written to it$"):
        CachedEncoder(Model(), tmp_path).encode_document(["a"])


class Weights(torch.nn.Module):
    pooling = "mean"

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))


def test_the_fingerprint_is_of_all_that_the_vectors_depend_on():
    def wrapped(**changes):
        return SimpleNamespace(model=Weights(), tokenizer=SimpleNamespace(max_length=8), **changes)

    base = fingerprint(wrapped())
    assert fingerprint(wrapped()) == base
    assert len(base) == 32
    other = wrapped()
    with torch.no_grad():
        other.model.weight[1, 2] += 1
    found = [base, fingerprint(other)]
    for change in (torch.Tensor.double, lambda x: x.view(3, 2), lambda x: x.T.contiguous()):
        other = wrapped()
        other.model.weight = torch.nn.Parameter(change(other.model.weight.detach()))
        found.append(fingerprint(other))
    other = wrapped()
    other.model.renamed, other.model.weight = other.model.weight, None
    found.append(fingerprint(other))
    other = wrapped()
    other.tokenizer.max_length = 9
    found.append(fingerprint(other))
    settings = "pooling", "attention", "max_seq_length", "prompts", "default_prompt_name", "truncate_dim", "normalize"
    for name in settings:
        found.append(fingerprint(wrapped(**{name: "x"})))
        other = wrapped()
        setattr(other.model, name, "y")
        found.append(fingerprint(other))
    assert len(set(found)) == len(found) == 7 + 2 * len(settings)


def test_the_fingerprint_is_of_the_configuration_and_the_tokenizer():
    def changed(change):
        model = tiny_embedder()
        change(model)
        return fingerprint(model)

    def with_rope(model):
        model.model.config = model.config = replace(model.config, rope_theta=500.0)

    changes = [
        lambda model: None,
        with_rope,
        lambda model: model.tokenizer.backend.__setattr__("normalizer", Lowercase()),
        lambda model: model.prompts.update(document="\udcff"),
        lambda model: setattr(model, "normalize", False),
    ]
    found = [changed(change) for change in changes]
    assert found == [changed(change) for change in changes]
    assert len(set(found)) == len(found)


def test_the_fingerprint_of_a_model_of_another_library():
    def wrapped(text, **config):
        inner = Weights()
        inner.config = SimpleNamespace(to_dict=lambda: config)
        inner.tokenizer = SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: text))
        return fingerprint(SimpleNamespace(model=inner))

    base = wrapped("a", theta=1, _name_or_path="here", dtype=torch.float32)
    assert wrapped("a", theta=1, _name_or_path="there", dtype=torch.float32) == base
    assert wrapped("b", theta=1, dtype=torch.float32) != base
    assert wrapped("a", theta=2, dtype=torch.float32) != base

    def in_python(**vocabulary):
        inner = Weights()
        inner.tokenizer = SimpleNamespace(backend="python", get_vocab=lambda: vocabulary)
        return fingerprint(SimpleNamespace(model=inner))

    assert in_python(a=1, b=2) == in_python(b=2, a=1)
    assert in_python(a=1, b=2) != in_python(a=2, b=1)


def test_the_fingerprint_of_a_model_of_sentence_transformers(tmp_path):
    """Its tokenizer of transformers 5 has an attribute `backend` that is a string."""
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    folder = str(tiny_embedder().save_pretrained(tmp_path / "model"))
    found = []
    for change in (
        lambda model: None,
        lambda model: model.tokenizer.backend_tokenizer.__setattr__("normalizer", Lowercase()),
    ):
        model = st.SentenceTransformer(folder, device="cpu", local_files_only=True)
        change(model)
        found.append(fingerprint(UnitEncoder(model)))
    assert found[0] == fingerprint(UnitEncoder(st.SentenceTransformer(folder, device="cpu", local_files_only=True)))
    assert found[0] != found[1]


def test_what_has_a_fingerprint():
    assert fingerprint(SimpleNamespace(fingerprint=7)) == "7"
    bare = Weights()
    assert fingerprint(bare) == fingerprint(bare)
    strided = Weights()
    strided.weight = torch.nn.Parameter(torch.arange(6.0).view(3, 2).T.contiguous().T.view(3, 2).T)
    assert fingerprint(strided) != fingerprint(bare)  # by its values, in its own order
    for model in (object(), SimpleNamespace(model=object()), SimpleNamespace(model=None)):
        with pytest.raises(ConfigError) as caught:
            fingerprint(model)
        assert str(caught.value) == (
            f"a cache of vectors needs a model with weights or an attribute fingerprint, got {type(model).__name__}"
        )


def test_chunks():
    assert list(chunks(7, 3)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(chunks(6, 3)) == [slice(0, 3), slice(3, 6)]
    assert list(chunks(0, 3)) == []
