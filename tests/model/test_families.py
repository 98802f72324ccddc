"""Llama, Qwen2 and Mistral on the packed model against transformers: biases, no q/k norm, scaled rotary embeddings."""

import json
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from pyqemb.data.batch import PackedBatch
from pyqemb.errors import CheckpointError, ConfigError, DataError
from pyqemb.model import decoder
from pyqemb.model.config import DecoderConfig
from pyqemb.model.decoder import Block, Family, TokenEmbedding
from pyqemb.model.embedder import Embedder
from pyqemb.model.families import FAMILIES, parse_config
from pyqemb.model.families.qwen3 import Qwen3Config
from pyqemb.model.lora import LoraConfig, adapted, add_lora, load_adapter, save_adapter
from pyqemb.model.residual_stream import Boundaries
from pyqemb.testing.tiny import TEXTS, tiny_config, tiny_embedder, tiny_tokenizer

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, eos_token_id=0,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
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
        assert (wanted - found).abs().max() < 1e-4
        assert wanted.abs().max() > 0.5


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
    assert not config.tie_word_embeddings
    assert not config.qkv_bias
    qwen2 = parse_config({**old, "model_type": "qwen2", "attention_bias": False})
    assert qwen2.qkv_bias
    assert not qwen2.output_bias
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
    assert embedder.tokenizer.end_token == "</s>"
    assert embedder.tokenizer.encode_documents(["x"])[0][-1] == embedder.tokenizer.end_id
    again = Embedder.from_pretrained(embedder.save_pretrained(tmp_path / "out"), device="cpu")
    assert (again.encode(TEXTS) == embedder.encode(TEXTS)).all()
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"qwen3"'))
    with pytest.raises(DataError, match=r"has no token '<\|endoftext\|>'"):
        Embedder.from_pretrained(tmp_path)


def test_a_configuration_belongs_to_one_family():
    for model_type, family in FAMILIES.items():
        config = tiny_config(model_type=model_type)
        assert type(config) is family.config
        assert config.model_type == model_type
        assert type(parse_config(config.to_dict())) is family.config
        assert parse_config(config.to_dict()) == config
    with pytest.raises(ConfigError, match="model_type must be 'qwen3', got 'llama'"):
        Qwen3Config(**{**SIZES, "num_key_value_heads": 2, "head_dim": 16, "model_type": "llama"})


@dataclass(frozen=True)
class OtherConfig(DecoderConfig):
    """A family with a setting and weight names of its own, whose layers normalize what they add."""

    model_type: str = "other"
    embedding_scale: float = 1.0

    architectures: ClassVar[tuple[str, ...]] = ("OtherModel",)
    qk_norm: ClassVar[bool] = True


class OtherBlock(Block):
    def forward(self, x_TE, tokens, stream):
        x_SE = tokens.queries(x_TE) + self.input_layernorm(self.self_attn.o_proj(self.self_attn(x_TE, tokens)))
        return stream.add(x_SE, self.mlp.down_proj, self.mlp(self.post_attention_layernorm(x_SE)))


class ScaledEmbedding(TokenEmbedding):
    def __init__(self, config):
        super().__init__(config)
        self.scale = config.embedding_scale

    def forward(self, batch):
        rows, inverse_T = super().forward(batch)
        return rows * self.scale, inverse_T


@pytest.fixture
def other(monkeypatch):
    """An embedder of a family that is registered for the test."""
    names = {"embed_tokens": "embeddings.words", "layers.": "encoder.layer.", "self_attn.q_proj": "attention.query"}
    family = Family(OtherConfig, block=OtherBlock, embedding=ScaledEmbedding, weight_names=names)
    monkeypatch.setitem(FAMILIES, "other", family)
    return tiny_embedder(model_type="other", embedding_scale=3.0)


def test_a_family_names_its_weights(other, tmp_path):
    folder = other.save_pretrained(tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(stored["encoder.layer.1.attention.query.weight"], other.model.layers[1].self_attn.q_proj.weight)
    assert "embeddings.words.weight" in stored
    assert not any(name.startswith(("layers", "embed_tokens")) for name in stored)
    again = Embedder.from_pretrained(folder, device="cpu")
    assert again.config == other.config
    assert again.config.embedding_scale == 3.0
    assert (again.encode(TEXTS) == other.encode(TEXTS)).all()
    add_lora(other.model, LoraConfig(rank=2, targets=("q_proj",)))
    adapter = save_adapter(other.model, tmp_path / "adapter")
    assert "base_model.model.encoder.layer.0.attention.query.lora_A.weight" in load_file(
        adapter / "adapter_model.safetensors"
    )
    load_adapter(again.model, adapter)
    assert len(adapted(again.model)) == 2
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    (folder / "pyqemb.json").unlink()
    with pytest.raises(CheckpointError, match="num_hidden_layers is 3, the weights hold 2 layers"):
        Embedder.from_pretrained(folder)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_mechanisms_serve_a_family_with_a_block_of_its_own(other, pooling, monkeypatch):
    """Query subset, distinct tokens, boundaries and checkpointing change no gradient."""
    embedder = other.double()
    embedder.pooling = pooling
    batch = PackedBatch.pack([[5, 5, 7, 5], [7], [], [9, 7, 5, 9, 5, 5]])
    weights = torch.randn(4, 32, dtype=torch.float64)

    def gradients(boundaries=None, checkpointing=False):
        embedder.model.checkpointing = checkpointing
        embedder.zero_grad()
        (embedder(batch, boundaries=boundaries) * weights).sum().backward()
        return [p.grad.clone() for p in embedder.parameters()]

    filled = Boundaries()
    with torch.no_grad():
        embedder(batch, boundaries=filled)
    assert [len(sums) for sums in filled.layers] == [1, 1]
    found = [gradients(), gradients(filled), gradients(checkpointing=True), gradients(Boundaries(), checkpointing=True)]
    monkeypatch.setattr(decoder, "distinct", lambda ids: (ids, None))
    found.append(gradients())
    rows = F.normalize(embedder.hidden(batch)[batch.last_tokens()[0]], dim=-1)
    if pooling == "last":
        embedder.zero_grad()
        (rows * weights[[0, 1, 3]]).sum().backward()
        found.append([p.grad.clone() for p in embedder.parameters()])
    for other_gradients in found[1:]:
        for first, second in zip(found[0], other_gradients, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-10)


def test_the_documented_example_of_a_family(monkeypatch, tmp_path):
    page = Path(__file__).parents[2] / "docs" / "dev" / "adding.md"
    section = page.read_text(encoding="utf-8").partition("## A decoder family")[2]
    code = textwrap.dedent(re.search(r"^ *```python\n(.*?)^ *```", section, re.DOTALL | re.MULTILINE)[1])
    module = ModuleType("example_family")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, str(page), "exec"), module.__dict__)
    monkeypatch.setitem(FAMILIES, "example", module.FAMILY)
    embedder = tiny_embedder(model_type="example", embedding_scale=3.0)
    folder = embedder.save_pretrained(tmp_path / "out")
    assert "blocks.1.mlp.up_proj.weight" in load_file(folder / "model.safetensors")
    again = Embedder.from_pretrained(folder, device="cpu")
    assert again.config.embedding_scale == 3.0
    assert (again.encode(TEXTS) == embedder.encode(TEXTS)).all()
    values = json.loads((folder / "config.json").read_text())
    assert parse_config({**values, "logit_softcap": None, "num_key_value_heads": None}).num_key_value_heads == 4
    with pytest.raises(ConfigError, match=r"logit_softcap 30\.0 is not supported"):
        parse_config({**values, "logit_softcap": 30.0})


def test_a_final_norm_of_its_own_is_applied_before_pooling(monkeypatch):
    names = {"model_type": "other", "embedding_scale": 3.0}
    norm = lambda config: torch.nn.LayerNorm(config.hidden_size)  # noqa: E731
    monkeypatch.setitem(FAMILIES, "other", Family(OtherConfig, block=OtherBlock, embedding=ScaledEmbedding, norm=norm))
    embedder = tiny_embedder(**names).double()
    batch = PackedBatch.pack([[5, 5, 7, 5], [7], [9, 7, 5]])
    expected = F.normalize(embedder.hidden(batch)[batch.last_tokens()[0]], dim=-1)
    assert (embedder(batch) - expected).abs().max() < 1e-12
