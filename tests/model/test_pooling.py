"""Pooling: last, mean, cls and weighted mean against their formulas, and against sentence-transformers."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pyqemb import Embedder
from pyqemb.data.batch import PackedBatch
from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.interop.verify import verify
from pyqemb.model.residual_stream import Boundaries
from pyqemb.testing.tiny import TEXTS, tiny_config, tiny_embedder, tiny_tokenizer, write_tiny_folder

IDS = [[5, 6, 7], [], [8], [9, 5, 5, 6, 7, 11, 30]]
CASES = [
    ("last", True),
    ("last", False),
    ("mean", True),
    ("cls", False),
    ("weighted_mean", True),
    ("weighted_mean", False),
]
NAMES = {"last": "lasttoken", "mean": "mean", "cls": "cls", "weighted_mean": "weightedmean"}


def embedder(pooling, is_causal=False, dtype="float64"):
    config = tiny_config(is_causal=is_causal, initializer_range=0.3)
    return Embedder.from_config(config, tiny_tokenizer(), seed=5, pooling=pooling, dtype=dtype)


def expected_vector(pooling, hidden_TE):
    """The formula, for the tokens of one text."""
    if not len(hidden_TE):
        return hidden_TE.new_zeros(hidden_TE.shape[1])
    weights = {
        "last": [0.0] * (len(hidden_TE) - 1) + [1.0],
        "mean": [1.0] * len(hidden_TE),
        "cls": [1.0] + [0.0] * (len(hidden_TE) - 1),
        "weighted_mean": [float(place + 1) for place in range(len(hidden_TE))],
    }[pooling]
    weights_T = torch.tensor(weights, dtype=torch.float64)
    return (hidden_TE * weights_T[:, None]).sum(0) / weights_T.sum()


@pytest.mark.parametrize(("pooling", "is_causal"), CASES)
def test_vectors_and_gradients_are_those_of_the_formula(pooling, is_causal):
    model, batch = embedder(pooling, is_causal), PackedBatch.pack(IDS)
    weights_BE = torch.randn(len(IDS), 32, dtype=torch.float64)

    def gradients(vectors_BE):
        model.zero_grad()
        (vectors_BE * weights_BE).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    rows = [model.hidden(PackedBatch.pack([ids])) for ids in IDS]
    truth_BE = torch.stack([expected_vector(pooling, row) for row in rows])
    assert (model.pooled(batch) - truth_BE).abs().max() < 1e-12
    assert (model(batch) - F.normalize(truth_BE, dim=-1)).abs().max() < 1e-12
    assert (model(batch, dim=8) - F.normalize(truth_BE[:, :8], dim=-1)).abs().max() < 1e-12
    for ids, vector_E in zip(IDS, model(batch), strict=True):
        assert (model(PackedBatch.pack([ids]))[0] - vector_E).abs().max() < 1e-12
    expected, filled = gradients(F.normalize(truth_BE, dim=-1)), Boundaries()
    with torch.no_grad():
        model(batch, boundaries=filled)
    for found in (gradients(model(batch)), gradients(model(batch, boundaries=filled))):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)


def test_no_texts_and_empty_texts():
    for pooling in ("cls", "weighted_mean"):
        model = embedder(pooling, dtype="float32")
        assert model(PackedBatch.pack([])).shape == model.pooled(PackedBatch.pack([])).shape == (0, 32)
        rows = model(PackedBatch.pack([[], [3, 4], []]))
        assert rows.norm(dim=1).tolist() == pytest.approx([0, 1, 0])
        rows.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        low = embedder(pooling, dtype="bfloat16")
        assert low(PackedBatch.pack(IDS)).dtype == torch.float32


@pytest.mark.parametrize(("pooling", "is_causal"), CASES)
def test_saved_and_loaded_by_sentence_transformers(pooling, is_causal, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    model = tiny_embedder(seed=3, initializer_range=0.4, pooling=pooling, is_causal=is_causal)
    folder = model.save_pretrained(tmp_path / "model")
    again = Embedder.from_pretrained(folder, device="cpu")
    assert again.pooling == pooling
    texts = [text for text in TEXTS if text]
    vectors = model.encode(texts)
    assert (again.encode(texts) == vectors).all()
    theirs = st.SentenceTransformer(str(folder), device="cpu")
    assert np.abs(theirs.encode(texts) - vectors).max() < 1e-5
    # Versions before 6 pool by columns: the first one must hold the first token.
    right = pooling in ("cls", "weighted_mean")
    assert theirs.tokenizer.padding_side == ("right" if right else "left")
    theirs.save(str(tmp_path / "theirs"))
    assert Embedder.from_pretrained(tmp_path / "theirs", device="cpu").pooling == pooling
    checks = {check.name.split(" ")[0]: check for check in verify(folder)}
    assert checks["sentence-transformers"].outcome == checks["transformers"].outcome == "passed"
    assert checks["vLLM's"].outcome == checks["TEI's"].outcome == ("failed" if pooling == "weighted_mean" else "passed")


@pytest.mark.parametrize("mode", NAMES.values())
def test_both_spellings_of_a_mode_are_read(mode, tmp_path):
    folder = tiny_embedder(is_causal=False).save_pretrained(tmp_path / "model")
    file, flag = folder / "1_Pooling" / "config.json", {"cls": "cls_token", "mean": "mean_tokens"}.get(mode, mode)
    flag = {"weightedmean": "weightedmean_tokens"}.get(flag, flag)
    wanted = {theirs: ours for ours, theirs in NAMES.items()}[mode]
    for values in ({"pooling_mode": mode}, {f"pooling_mode_{flag}": True}, {"pooling_mode": [mode]}):
        file.write_text(json.dumps(values))
        assert Embedder.from_pretrained(folder, device="cpu").pooling == wanted


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pooling_mode": "max"}, r"pooling must be one of lasttoken, mean, cls, weightedmean, got \['max'\]"),
        ({"pooling_mode": ["cls", "mean"]}, r"pooling must be one of .*, got \['cls', 'mean'\]"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, r"got \['cls', 'mean'\]"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, r"got \['mean_sqrt_len_tokens'\]"),
        ({"pooling_mode": "cls", "include_prompt": False}, "include_prompt False is not supported with cls pooling"),
        ({"pooling_mode": "weightedmean", "include_prompt": False}, "include_prompt False .* weightedmean pooling"),
        ({"pooling_mode": "cls", "pooling_mode_lasttoken": True}, "pooling_mode_lasttoken true contradicts"),
    ],
    ids=str,
)
def test_other_modes_are_refused(values, message, tmp_path):
    folder = tiny_embedder(is_causal=False).save_pretrained(tmp_path / "model")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"1_Pooling/config.json: .*{message}"):
        Embedder.from_pretrained(folder, device="cpu")


def test_the_first_token_of_causal_attention_is_refused(tmp_path):
    message = "pooling 'cls' needs bidirectional attention: in causal attention the first token sees no other"
    with pytest.raises(ConfigError, match=message):
        tiny_embedder(pooling="cls")
    folder = write_tiny_folder(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        Embedder.from_pretrained(folder, pooling="cls", device="cpu")
    assert Embedder.from_pretrained(folder, attention="bidirectional", pooling="cls", device="cpu").pooling == "cls"
