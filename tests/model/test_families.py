"""Llama, Qwen2 and Mistral on the packed model against transformers: biases, no q/k norm, scaled rotary embeddings."""

import pytest
import torch
from torch.nn import functional as F

from pyqemb.data.batch import PackedBatch
from pyqemb.errors import ConfigError, DataError
from pyqemb.model.embedder import Embedder
from pyqemb.model.families import parse_config
from pyqemb.model.residual_stream import Boundaries
from pyqemb.testing.tiny import TEXTS, tiny_tokenizer

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, eos_token_id=0,
)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "qwen2": dict(num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2, yarn": dict(num_key_value_heads=2, rope_parameters={**YARN, "rope_theta": 1e4}),
    "llama": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "llama, all biases": dict(attention_bias=True, mlp_bias=True),
    "llama, llama3": dict(head_dim=32, rope_parameters={**LLAMA3, "rope_theta": 5e5}),
    "llama, linear": dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "mistral": dict(num_key_value_heads=1, sliding_window=None),
    "qwen3, biases": dict(num_key_value_heads=2, head_dim=32, attention_bias=True),
}


def their_model(case):
    name = case.split(",")[0]
    config = transformers.AutoConfig.for_model(name, **SIZES, **CASES[case])
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(params=CASES, ids=lambda case: case.replace(", ", "-"))
def folder(request, tmp_path):
    """A checkpoint as transformers writes it."""
    their_model(request.param).save_pretrained(tmp_path)
    tiny_tokenizer().save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_equals_transformers(folder, is_causal):
    theirs = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager")
    ours = Embedder.from_pretrained(folder, attention="causal" if is_causal else "bidirectional", device="cpu")
    ids = ours.tokenizer.encode_documents([text for text in TEXTS if text])
    for row in ids:
        mask = torch.ones(1, 1, len(row), len(row), dtype=torch.bool)
        mask = torch.zeros(mask.shape).masked_fill(~(mask.tril() if is_causal else mask), -1e30)
        wanted = theirs(torch.tensor([row]), attention_mask=mask).last_hidden_state[0]
        found = ours.hidden(PackedBatch.pack([row]))
        assert (wanted - found).abs().max() < 1e-4 and wanted.abs().max() > 0.5


def test_gradients_with_and_without_boundaries(folder):
    embedder = Embedder.from_pretrained(folder, device="cpu").double()
    batch = PackedBatch.pack(embedder.tokenizer.encode_documents(TEXTS))
    weights = torch.randn(len(TEXTS), embedder.config.hidden_size, dtype=torch.float64)

    def gradients(boundaries):
        embedder.zero_grad()
        (embedder(batch, boundaries=boundaries) * weights).sum().backward()
        return {name: p.grad.clone() for name, p in embedder.model.named_parameters() if p.grad is not None}

    plain, kept = gradients(None), Boundaries()
    with torch.no_grad():
        embedder(batch, boundaries=kept)
    spared = gradients(kept)
    assert set(plain) == set(spared) == {name for name, _ in embedder.model.named_parameters()}
    for name, gradient in plain.items():
        torch.testing.assert_close(spared[name], gradient, rtol=1e-9, atol=1e-9)
    # A step along the gradient of a bias moves the objective by its squared norm.
    for name, parameter in embedder.model.named_parameters():
        if name.endswith("o_proj.bias"):
            with torch.no_grad():
                before = (embedder(batch) * weights).sum()
                parameter.add_(plain[name], alpha=1e-6)
                after = (embedder(batch) * weights).sum()
            assert float(after - before) == pytest.approx(1e-6 * float(plain[name].square().sum()), rel=1e-3)
            break


def test_saved_and_loaded_elsewhere(folder, tmp_path):
    ours = Embedder.from_pretrained(folder, device="cpu")
    again = Embedder.from_pretrained(ours.save_pretrained(tmp_path / "out"), device="cpu")
    assert again.config == ours.config
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert type(theirs).__name__.lower() == f"{ours.config.model_type}model"
    vectors = ours.encode(["The capital of China is Beijing."])
    assert (again.encode(["The capital of China is Beijing."]) == vectors).all()
    ids = torch.tensor(ours.tokenizer.encode_documents(["The capital of China is Beijing."]))
    wanted = F.normalize(theirs(ids).last_hidden_state[:, -1], dim=-1)
    assert (wanted - torch.from_numpy(vectors)).abs().max() < 1e-5


def test_what_is_absent_means_what_transformers_takes_it_for():
    old = {**SIZES, "model_type": "llama"}  # Llama 1: no key heads, no head_dim, no rotary base
    config = parse_config(old)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 16, 10_000.0)
    assert not config.tie_word_embeddings and not config.qkv_bias
    qwen2 = parse_config({**old, "model_type": "qwen2", "attention_bias": False})
    assert qwen2.qkv_bias and not qwen2.output_bias
    windowed = {**old, "model_type": "mistral", "sliding_window": 64}
    with pytest.raises(ConfigError, match="sliding_window is not supported, got 64"):
        parse_config(windowed)
    assert parse_config({**windowed, "sliding_window": 4096}).head_dim == 16


def test_a_tokenizer_with_another_end(tmp_path):
    """Llama's texts end with its eos_token; a Qwen3 without <|endoftext|> is refused."""
    their_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace("<|endoftext|>", "</s>"), encoding="utf-8")
    embedder = Embedder.from_pretrained(tmp_path, device="cpu")
    assert (
        embedder.tokenizer.end_token == "</s>"
        and embedder.tokenizer.encode_documents(["x"])[0][-1] == embedder.tokenizer.end_id
    )
    again = Embedder.from_pretrained(embedder.save_pretrained(tmp_path / "out"), device="cpu")
    assert (again.encode(TEXTS) == embedder.encode(TEXTS)).all()
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"qwen3"'))
    with pytest.raises(DataError, match=r"has no token '<\|endoftext\|>'"):
        Embedder.from_pretrained(tmp_path)
