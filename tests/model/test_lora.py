"""Adapters: peft loads what we write and we load what peft writes, with equal outputs; merging; what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyqemb.data.batch import PackedBatch
from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.model.embedder import Embedder
from pyqemb.model.lora import (
    TARGETS,
    LoraConfig,
    MergedParameters,
    adapted,
    add_lora,
    load_adapter,
    merge_adapters,
    merge_lora,
    save_adapter,
)
from pyqemb.model.residual_stream import Boundaries
from pyqemb.testing.tiny import TEXTS, tiny_embedder

TEXTS = [text for text in TEXTS if text]


@pytest.fixture
def base(tmp_path):
    return tiny_embedder().save_pretrained(tmp_path / "base")


def loaded(base):
    return Embedder.from_pretrained(base, device="cpu")


def with_adapter(base, seed=0, **options):
    """An embedder whose adapters change something."""
    embedder = loaded(base)
    add_lora(embedder.model, LoraConfig(**{"rank": 4, "alpha": 6.0, **options}), seed)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for linear in adapted(embedder.model).values():
            linear.lora.B.copy_(torch.randn(linear.lora.B.shape, generator=generator) * 0.3)
    return embedder.eval()


def their_vectors(model, embedder):
    """By transformers: last tokens, normalised."""
    rows = []
    for ids in embedder.tokenizer.encode_documents(TEXTS):
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).last_hidden_state[0, -1]
        rows.append(torch.nn.functional.normalize(hidden, dim=0))
    return torch.stack(rows).numpy()


def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(base):
    embedder, plain = loaded(base), loaded(base).encode(TEXTS)
    add_lora(embedder.model, LoraConfig(rank=4, targets=("q_proj", "down_proj")))
    assert (embedder.encode(TEXTS) == plain).all()
    assert {name.rpartition(".")[2] for name in adapted(embedder.model)} == {"q_proj", "down_proj"}
    embedder(PackedBatch.pack(embedder.tokenizer.encode_documents(TEXTS))).sum().backward()
    for name, parameter in embedder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (".lora." in name), name


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_peft_loads_what_we_write(base, tmp_path, rank_stabilized):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    embedder = with_adapter(base, rank_stabilized=rank_stabilized)
    folder = save_adapter(embedder.model, tmp_path / "adapter", str(base))
    model = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(base), folder).eval()
    assert abs(their_vectors(model, embedder) - embedder.encode(TEXTS)).max() < 1e-5
    assert abs(loaded(base).encode(TEXTS) - embedder.encode(TEXTS)).max() > 1e-2
    causal = save_adapter(embedder.model, tmp_path / "causal", str(base), "CAUSAL_LM")
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), causal).eval()
    assert abs(their_vectors(model.base_model.model.model, embedder) - embedder.encode(TEXTS)).max() < 1e-5


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("head", [False, True], ids=["body", "causal"])
def test_we_load_what_peft_writes(base, tmp_path, head, rslora):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    kind = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "v_proj", "gate_proj"],
        use_rslora=rslora,
        init_lora_weights=False,
        task_type="CAUSAL_LM" if head else "FEATURE_EXTRACTION",
    )
    model = peft.get_peft_model(kind.from_pretrained(base), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    embedder = loaded(base)
    load_adapter(embedder.model, tmp_path / "adapter")
    body = model.base_model.model.model if head else model
    assert abs(their_vectors(body, embedder) - embedder.encode(TEXTS)).max() < 1e-5


def test_merging_into_the_weights(base, tmp_path):
    embedder = with_adapter(base)
    wanted, folded = embedder.encode(TEXTS), dict(MergedParameters(embedder.model))
    again = loaded(embedder.save_pretrained(tmp_path / "saved"))
    assert set(folded) == {name for name, _ in again.model.named_parameters()}
    assert abs(again.encode(TEXTS) - wanted).max() < 1e-5
    merge_lora(embedder.model)
    assert not adapted(embedder.model)
    assert all(p.requires_grad for p in embedder.parameters())
    assert abs(embedder.encode(TEXTS) - wanted).max() < 1e-5


def test_boundaries_and_gradients_agree(base):
    embedder = with_adapter(base).double()
    batch = PackedBatch.pack(embedder.tokenizer.encode_documents(TEXTS))
    weights = torch.randn(len(TEXTS), 32, dtype=torch.float64)

    def gradients(model, boundaries=None):
        model.zero_grad()
        (model(batch, boundaries=boundaries) * weights).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, kept = gradients(embedder), Boundaries()
    with torch.no_grad():
        embedder(batch, boundaries=kept)
    spared = gradients(embedder, kept)
    # dL/dB = scale dL/dW A^T and dL/dA = scale B^T dL/dW, with dL/dW from the model whose weights hold the adapters.
    twin = with_adapter(base).double()
    layers = adapted(embedder.model)
    merge_lora(twin.model)
    whole = gradients(twin)
    for name, linear in layers.items():
        lora, dw = linear.lora, whole[f"model.{name}.weight"]
        pairs = {"B": lora.scale * dw @ lora.A.T, "A": lora.scale * lora.B.T @ dw}
        for side, wanted in pairs.items():
            for found in (plain, spared):
                torch.testing.assert_close(found[f"model.{name}.lora.{side}"], wanted, rtol=1e-5, atol=1e-6)


def test_merging_adapters(base, tmp_path):
    embedders = [with_adapter(base, seed, rank=rank) for seed, rank in ((0, 4), (1, 2))]
    folders = [save_adapter(e.model, tmp_path / str(i)) for i, e in enumerate(embedders)]
    merged = loaded(base)
    load_adapter(merged.model, merge_adapters(folders, [0.7, -0.2], out=tmp_path / "sum"))
    bases = dict(loaded(base).model.named_parameters())
    parts = [MergedParameters(e.model) for e in embedders]
    for name, tensor in MergedParameters(merged.model).items():
        wanted = bases[name] + 0.7 * (parts[0][name] - bases[name]) - 0.2 * (parts[1][name] - bases[name])
        assert (tensor - wanted).abs().max() < 1e-5, name
    small = loaded(base)
    load_adapter(small.model, merge_adapters(folders, [0.7, -0.2], out=tmp_path / "small", rank=3))
    for name in adapted(small.model):
        delta, exact = (MergedParameters(m.model)[f"{name}.weight"] - bases[f"{name}.weight"] for m in (small, merged))
        u, s, v = torch.linalg.svd(exact)
        best = (u[:, :3] * s[:3]) @ v[:3]
        assert (delta - best).abs().max() < 1e-4
        assert torch.linalg.matrix_rank(delta, rtol=1e-4) == 3
    with pytest.raises(ConfigError, match="adapters: two or more are needed, got 1"):
        merge_adapters(folders[:1], out=tmp_path / "x")
    with pytest.raises(ConfigError, match="one number for each of the 2 adapters"):
        merge_adapters(folders, [1.0], out=tmp_path / "x")
    other = save_adapter(with_adapter(base, targets=("q_proj",)).model, tmp_path / "other")
    with pytest.raises(CheckpointError, match="its adapters are not for the modules of"):
        merge_adapters([folders[0], other], out=tmp_path / "x")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not an adapter; refusing to replace it"):
        merge_adapters(folders, out=tmp_path / "notes")


def test_what_is_refused(base, tmp_path):
    for options, message in (
        ({"rank": 0}, "lora.rank must be at least 1"),
        ({"targets": ("lm_head",)}, "lora.targets must be among"),
        ({"dropout": 1.0}, "lora.dropout must lie in"),
    ):
        with pytest.raises(ConfigError, match=message):
            LoraConfig(**options)
    assert set(LoraConfig().targets) == set(TARGETS)
    embedder = loaded(base)
    with pytest.raises(ConfigError, match="has no adapters to save"):
        save_adapter(embedder.model, tmp_path / "none")
    folder = save_adapter(with_adapter(base).model, tmp_path / "adapter")
    load_adapter(embedder.model, folder)
    with pytest.raises(ConfigError, match="has adapters already"):
        load_adapter(embedder.model, folder)
    settings, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )

    def refused(message, changed=settings, weights=tensors):
        (folder / "adapter_config.json").write_text(json.dumps(changed))
        save_file(weights, folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_adapter(loaded(base).model, folder)

    refused("use_dora True is not supported", {**settings, "use_dora": True})
    refused("not a LoRA adapter: KeyError", {"r": 4})
    refused("does not have the two matrices of an adapter of rank 9", {**settings, "r": 9})
    some = next(iter(tensors))
    refused("does not have the two matrices", weights={name: t for name, t in tensors.items() if name != some})
    refused("holds NaN or infinity", weights={**tensors, some: tensors[some] * float("nan")})
    refused("is not a weight of a LoRA adapter", weights={**tensors, "base_model.model.norm.weight": torch.ones(3)})
    wide = {name: torch.cat([t, t], dim=1) if "lora_A" in name else t for name, t in tensors.items()}
    refused("is for a weight of shape", weights=wide)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is a pickle, which can run code"):
        load_adapter(loaded(base).model, folder)
