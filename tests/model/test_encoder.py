import json

import numpy as np
import pytest

from pyqemb.errors import CheckpointError
from pyqemb.model.embedder import Embedder
from pyqemb.model.encoder import SentenceTransformerEncoder, open_encoder, unit_encoder
from pyqemb.testing.tiny import TEXTS, tiny_embedder, write_tiny_folder


def test_a_qwen3_folder_is_ours(tmp_path):
    write_tiny_folder(tmp_path / "model")
    assert isinstance(open_encoder(tmp_path / "model"), Embedder)


def test_vectors_of_sentence_transformers(tmp_path):
    pytest.importorskip("sentence_transformers")
    write_tiny_folder(tmp_path / "tiny")
    ours = Embedder.from_pretrained(tmp_path / "tiny")
    ours.save_pretrained(tmp_path / "model")
    theirs = SentenceTransformerEncoder(tmp_path / "model")
    np.testing.assert_allclose(theirs.encode_document(TEXTS), ours.encode_document(TEXTS), atol=1e-5)
    np.testing.assert_allclose(theirs.encode_query(TEXTS, instruction="x"), ours.encode_query(TEXTS), atol=1e-5)


def test_other_architectures_and_their_formats(tmp_path):
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "modules.json").write_text("[]")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"bert: has no \.safetensors"):
        open_encoder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        open_encoder(folder)
    with pytest.raises(CheckpointError, match="no such model folder"):
        open_encoder(tmp_path / "nowhere")


def test_searches_get_unit_vectors_whatever_the_folder_says():
    model = tiny_embedder()
    assert unit_encoder(model) is model
    model.normalize, model.truncate_dim = False, 8
    unit = unit_encoder(model)
    for found in (unit.encode_query(TEXTS), unit.encode_document(TEXTS), unit.encode_query(TEXTS, dim=4)):
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert unit.encode_document(TEXTS).shape == (len(TEXTS), 8)
    assert unit.device == model.device
    assert abs(np.linalg.norm(model.encode_document(TEXTS), axis=1) - 1).max() > 0.01
