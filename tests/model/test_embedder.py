"""Embedder: texts to unit vectors, order kept, prompts, Matryoshka cuts, pooling, loading and initialising."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyqemb import Embedder, PackedBatch
from pyqemb.errors import CheckpointError, ConfigError, DataError
from pyqemb.testing.tiny import TEXTS, tiny_config, tiny_embedder, tiny_tokenizer, write_tiny_folder


@pytest.fixture(scope="module")
def model() -> Embedder:
    return tiny_embedder(seed=5, initializer_range=0.3)


def pack(model: Embedder, texts) -> PackedBatch:
    return PackedBatch.pack(model.tokenizer.encode_documents(texts))


def test_encode_keeps_the_order_at_any_chunk_size(model):
    one_by_one = np.stack([model.encode(text) for text in TEXTS])
    assert one_by_one.shape == (len(TEXTS), 32)
    assert one_by_one.dtype == np.float32
    assert np.abs(np.linalg.norm(one_by_one, axis=1) - 1).max() < 1e-6
    for tokens_per_chunk in (1, 50, 16384):
        assert np.abs(model.encode(TEXTS, tokens_per_chunk=tokens_per_chunk) - one_by_one).max() < 1e-6
    assert np.abs(one_by_one[0] - one_by_one[1:]).max(axis=1).min() > 1e-2


def test_large_inputs_go_in_windows(model, monkeypatch):
    whole = model.encode(TEXTS)
    monkeypatch.setattr("pyqemb.model.encoding._TEXTS_AT_ONCE", 3)
    assert np.abs(model.encode(TEXTS) - whole).max() < 1e-6


def test_encode_equals_the_plain_formula(model):
    batch = pack(model, TEXTS)
    tokens, _ = batch.last_tokens()
    with torch.no_grad():
        expected = F.normalize(model.hidden(batch)[tokens], dim=-1)
        assert (model(batch) - expected).abs().max() < 1e-6
    assert np.abs(model.encode(TEXTS) - expected.numpy()).max() < 1e-6


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_dim_cuts_and_normalises_again(pooling):
    model = tiny_embedder(seed=5, initializer_range=0.3, pooling=pooling)
    full, cut = model.encode(TEXTS), model.encode(TEXTS, dim=8)
    assert cut.shape == (len(TEXTS), 8)
    assert np.abs(cut - full[:, :8] / np.linalg.norm(full[:, :8], axis=1, keepdims=True)).max() < 1e-6
    with pytest.raises(TypeError, match=r"dim must be an integer or None, got 8\.0"):
        model.encode(TEXTS, dim=8.0)
    for dim in (0, 33, -1):
        with pytest.raises(ConfigError, match=r"dim must lie in 1\.\.32"):
            model.encode(TEXTS, dim=dim)


def test_mean_pooling():
    model = tiny_embedder(seed=5, initializer_range=0.3, pooling="mean")
    batch = PackedBatch.pack([[1, 2, 3], [], [4]])
    with torch.no_grad():
        hidden = model.hidden(batch)
        expected = F.normalize(torch.stack([hidden[:3].mean(0), torch.zeros(32), hidden[3]]), dim=-1)
        assert (model(batch) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_nothing_and_empty_sequences(pooling):
    model = tiny_embedder(pooling=pooling)
    assert model.encode([]).shape == model.encode([], dim=4).shape == (0,)
    assert model.encode_query([]).shape == (0,)
    assert model(PackedBatch.pack([])).shape == (0, 32)
    rows = model(PackedBatch.pack([[], [3, 4], []]))
    assert rows.norm(dim=1).tolist() == pytest.approx([0, 1, 0])
    rows.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_gradients_by_finite_differences(pooling):
    config = tiny_config(hidden_size=16, intermediate_size=8, head_dim=8, initializer_range=0.3)
    model = Embedder.from_config(config, tiny_tokenizer(), pooling=pooling, dtype="float64")
    batch = PackedBatch.pack([[5, 6, 7], [], [8]])
    names = ["model.norm.weight", "model.layers.0.self_attn.k_norm.weight", "model.layers.1.input_layernorm.weight"]
    values = [dict(model.named_parameters())[name].detach().clone().requires_grad_() for name in names]

    def forward(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (batch, 10))

    assert torch.autograd.gradcheck(forward, values)


def test_low_precision_models_still_give_float32_unit_vectors(model):
    low = Embedder.from_config(model.config, model.tokenizer, seed=5, dtype="bfloat16")
    vectors = low(pack(low, TEXTS))
    assert vectors.dtype == torch.float32
    assert low.dtype == torch.bfloat16
    assert (vectors.norm(dim=1) - 1).abs().max() < 1e-6
    assert (vectors * torch.from_numpy(model.encode(TEXTS))).sum(1).min() > 0.995
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(pack(model, TEXTS))
    assert mixed.dtype == torch.float32
    assert (mixed * torch.from_numpy(model.encode(TEXTS))).sum(1).min() > 0.995


def test_queries_and_documents(model):
    texts = ["where?", "when?"]
    template = "Instruct: {}\nQuery:{}"
    default = "Given a web search query, retrieve relevant passages that answer the query"
    assert model.default_instruction == default
    raw = model.encode(texts)
    for task, vectors in (
        (default, model.encode_query(texts)),
        ("Find", model.encode_query(texts, instruction="Find")),
        ("Find", model.encode(texts, instruction="Find")),
    ):
        assert np.abs(model.encode([template.format(task, text) for text in texts]) - vectors).max() < 1e-6
        assert np.abs(raw - vectors).max() > 1e-2
    assert np.array_equal(model.encode_document(texts), raw)
    assert model.encode_query("where?").shape == (32,)
    assert model.encode_query(texts, dim=4).shape == (2, 4)


def test_the_default_instruction_travels_with_the_checkpoint(tmp_path):
    model = tiny_embedder()
    model.default_instruction = "Find the paragraph"
    model.save_pretrained(tmp_path / "a")
    again = Embedder.from_pretrained(tmp_path / "a")
    assert again.default_instruction == "Find the paragraph"
    again.prompts |= {"query": "query: ", "document": "passage: "}
    assert again.default_instruction is None
    again.save_pretrained(tmp_path / "b")
    other = Embedder.from_pretrained(tmp_path / "b")
    assert np.array_equal(other.encode_query(["x"]), other.encode(["query: x"]))
    assert np.array_equal(other.encode_document(["x"]), other.encode(["passage: x"]))
    other.default_instruction = None
    assert other.prompts["query"] == ""
    assert np.array_equal(other.encode_query(["x"]), other.encode(["x"]))


def test_similarity_takes_numpy_and_torch(model):
    a, b = model.encode(TEXTS[:2]), model.encode(TEXTS[:3])
    expected = a @ b.T
    assert np.allclose(model.similarity(a, b), expected)
    assert isinstance(model.similarity(a, b), torch.Tensor)
    assert model.similarity(a[0], b).shape == (1, 3)
    torch_result = model.similarity(torch.from_numpy(a), b)
    assert isinstance(torch_result, torch.Tensor)
    assert np.allclose(torch_result.numpy(), expected)


def test_saving_and_loading_changes_no_bit(tmp_path, model):
    before = model.encode(TEXTS)
    assert model.save_pretrained(tmp_path / "m") == tmp_path / "m"
    again = Embedder.from_pretrained(str(tmp_path / "m"))
    assert np.array_equal(again.encode(TEXTS), before)
    assert (again.attention, again.pooling, again.prompts) == (model.attention, model.pooling, model.prompts)
    assert again.tokenizer.max_length == model.tokenizer.max_length


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_attention_and_pooling_are_stored_and_can_be_overruled(tmp_path, attention, pooling):
    model = Embedder.from_config(tiny_config(), tiny_tokenizer(), attention=attention, pooling=pooling)
    model.save_pretrained(tmp_path / "m")
    again = Embedder.from_pretrained(tmp_path / "m")
    assert (again.attention, again.pooling) == (attention, pooling)
    other = Embedder.from_pretrained(tmp_path / "m", attention="causal", pooling="last")
    assert (other.attention, other.pooling) == ("causal", "last")


def test_a_base_model_is_causal_with_last_pooling(tmp_path):
    model = Embedder.from_pretrained(write_tiny_folder(tmp_path, dtype=torch.bfloat16))
    assert (model.attention, model.pooling, model.dtype) == ("causal", "last", torch.bfloat16)
    assert model.tokenizer.max_length == 512  # max_position_embeddings
    assert Embedder.from_pretrained(tmp_path, dtype="float32", max_length=9).tokenizer.max_length == 9


def test_initialisation_is_a_function_of_the_seed_alone():
    state = torch.get_rng_state()
    first = tiny_embedder(seed=7)
    torch.manual_seed(123)
    second, third = tiny_embedder(seed=7), tiny_embedder(seed=8)
    torch.set_rng_state(state)
    tiny_embedder(seed=9)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert torch.equal(value, third.state_dict()[name]) == (value.ndim == 1)
    table = first.model.embed_tokens.weight
    assert abs(table.std() - 0.02) < 0.001
    assert abs(table.mean()) < 0.001
    assert (first.model.norm.weight == 1).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.encode(["a", None]), TypeError, r"texts\[1\] must be text, got None"),
        (lambda m: m.encode(["a"], instruction=["x", "y"]), ValueError, "one instruction for each of 1 texts, got 2"),
        (lambda m: m([[1, 2]]), TypeError, "batch must be a PackedBatch, got list"),
        (lambda m: m(PackedBatch.pack([[1, 384]])), IndexError, r"0\.\.383 \(vocab_size\), got 384"),
        (lambda m: m(PackedBatch.pack([[1, -1]])), IndexError, "got -1"),
        (lambda m: m.hidden(PackedBatch.pack([[9999]])), IndexError, "got 9999"),
        (lambda m: m.encode(["a"], tokens_per_chunk=0), ValueError, "tokens_per_chunk must be at least 1"),
        (lambda m: m.save_pretrained("x", dtype="int8"), ConfigError, "dtype must be float32"),
        (lambda m: Embedder(m.model, m.tokenizer, pooling="max"), ConfigError, "pooling must be one of last, mean"),
    ],
)
def test_bad_arguments(model, call, error, message):
    with pytest.raises(error, match=message):
        call(model)


def test_bad_folders(tmp_path):
    with pytest.raises(CheckpointError, match="no such model folder"):
        Embedder.from_pretrained(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Embedder.from_pretrained(tmp_path)
    folder = write_tiny_folder(tmp_path / "m")
    with pytest.raises(ConfigError, match="attention must be 'causal', 'bidirectional' or None, got 'full'"):
        Embedder.from_pretrained(folder, attention="full")
    with pytest.raises(ConfigError, match="dtype must be"):
        Embedder.from_pretrained(folder, dtype="int4")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        Embedder.from_pretrained(folder)
    with pytest.raises(ConfigError, match="the tokenizer has 360 ids, the model only 300"):
        tiny_embedder(vocab_size=300)


def test_hub_ids_ask_the_hub_for_weights_and_text_files_only(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    folder = write_tiny_folder(tmp_path)
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    Embedder.from_pretrained("Org/some-model")
    assert asked == [("Org/some-model", ["*.safetensors", "*.json", "*.txt", "*.jinja"])]

    def offline(name, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="Org/some-model: no such folder, and the download from the hub failed"):
        Embedder.from_pretrained("Org/some-model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        Embedder.from_pretrained("Org/some-model")
    assert len(asked) == 1
