"""The packed model against transformers' padded one, and against itself: packing, order, the last-layer shortcut."""

from dataclasses import replace

import pytest
import torch

from pyqemb.data.batch import PackedBatch
from pyqemb.model import decoder
from pyqemb.model.config import DecoderConfig
from pyqemb.model.decoder import Decoder
from pyqemb.model.families import build_decoder
from pyqemb.model.families.qwen3 import Qwen3Config
from pyqemb.model.residual_stream import Boundaries
from pyqemb.testing.tiny import tiny_config

REAL_SHAPE = Qwen3Config(  # Qwen3-Embedding-0.6B, but four layers and a small vocabulary
    vocab_size=997,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
)
MASKS = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])


def random_model(config: DecoderConfig, dtype: torch.dtype = torch.float32, deviation: float = 0.05) -> Decoder:
    generator = torch.Generator().manual_seed(1)
    model = build_decoder(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.ndim == 1 else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(centre + deviation * noise)
    return model


def random_ids(lengths: list[int], vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def transformers_hidden(model: Decoder, ids: list[list[int]]) -> torch.Tensor:
    """Last hidden states [T, E] of transformers' Qwen3Model with the same weights, right-padded, padding removed."""
    transformers = pytest.importorskip("transformers")
    config = model.config.to_dict() | {"use_cache": False}
    with torch.device("meta"):
        theirs = transformers.Qwen3Model(transformers.Qwen3Config(**config))
    theirs.rotary_emb = type(theirs.rotary_emb)(theirs.config)  # its frequencies are no parameters: make them real
    theirs.load_state_dict(model.state_dict(), assign=True)
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    with torch.no_grad():
        hidden = theirs.eval()(input_ids=padded, attention_mask=mask).last_hidden_state
    return hidden[mask.bool()]


@MASKS
def test_equals_transformers_on_the_real_shape(is_causal):
    model = random_model(replace(REAL_SHAPE, is_causal=is_causal))
    ids = random_ids([1, 37, 5, 64, 2, 90], REAL_SHAPE.vocab_size)
    with torch.no_grad():
        ours = model(PackedBatch.pack(ids))
    theirs = transformers_hidden(model, ids)
    assert (ours - theirs).abs().max() < 1e-4
    assert theirs.abs().max() > 1  # not vacuous


def test_the_two_masks_differ_in_transformers_too():
    ids = random_ids([9, 20], 384)
    causal, bidirectional = (
        transformers_hidden(random_model(tiny_config(is_causal=value)), ids) for value in (True, False)
    )
    assert (causal - bidirectional).abs().max() > 1e-2


@MASKS
def test_equals_transformers_in_float64(is_causal):
    model = random_model(tiny_config(is_causal=is_causal), torch.float64, deviation=0.3)
    ids = random_ids([1, 30, 7], 384)
    with torch.no_grad():
        ours = model(PackedBatch.pack(ids))
    # transformers normalises in float32 whatever the storage, so the agreement ends there.
    assert (ours - transformers_hidden(model, ids)).abs().max() < 2e-5


@MASKS
def test_bfloat16_is_no_worse_than_transformers(is_causal):
    exact = random_model(tiny_config(is_causal=is_causal, hidden_size=64), torch.float64, deviation=0.2)
    low = random_model(exact.config, torch.bfloat16, deviation=0.2)
    exact.load_state_dict({name: value.double() for name, value in low.state_dict().items()})
    ids = random_ids([50, 3, 120], 384)
    with torch.no_grad():
        truth, ours = exact(PackedBatch.pack(ids)), low(PackedBatch.pack(ids))
    theirs = transformers_hidden(low, ids)
    assert ours.dtype == torch.bfloat16
    assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max()
    assert (ours - truth).pow(2).mean() <= 1.6 * (theirs - truth).pow(2).mean()


@MASKS
def test_packing_equals_running_alone(is_causal):
    model = random_model(tiny_config(is_causal=is_causal), deviation=0.3)
    ids = random_ids([1, 40, 3, 1, 17], 384)
    with torch.no_grad():
        packed = model(PackedBatch.pack(ids)).split([len(row) for row in ids])
        for row, hidden in zip(ids, packed, strict=True):
            assert (model(PackedBatch.pack([row])) - hidden).abs().max() < 1e-5


@MASKS
def test_permuting_the_batch_permutes_the_output(is_causal):
    model = random_model(tiny_config(is_causal=is_causal), deviation=0.3)
    batch = PackedBatch.pack(random_ids([4, 9, 1, 30], 384))
    order = [2, 0, 3, 1]
    with torch.no_grad():
        straight, permuted = model(batch, only="last"), model(batch.select(order), only="last")
    assert (straight[order] - permuted).abs().max() < 1e-5


def test_a_token_sees_the_past_only_when_causal():
    ids = random_ids([12], 384)[0]
    changed = [*ids[:-1], (ids[-1] + 1) % 384]
    for is_causal in (True, False):
        model = random_model(tiny_config(is_causal=is_causal), deviation=0.3)
        with torch.no_grad():
            moved = (model(PackedBatch.pack([ids])) - model(PackedBatch.pack([changed]))).abs().amax(-1)
        assert moved[-1] > 1e-3
        assert (moved[:-1].max() < 1e-6) == is_causal


@pytest.mark.parametrize(("end", "is_causal"), [("last", True), ("last", False), ("first", False)])
@pytest.mark.parametrize("layers", [1, 2])
def test_one_token_of_a_text_equals_the_full_pass(end, is_causal, layers):
    model = random_model(tiny_config(is_causal=is_causal, num_hidden_layers=layers), torch.float64, deviation=0.3)
    batch = PackedBatch.pack([*random_ids([5, 1], 384), [], *random_ids([23], 384)])
    tokens, _ = batch.last_tokens() if end == "last" else batch.first_tokens()
    results = []
    for only in (None, end):
        model.zero_grad()
        rows = model.norm(model(batch, only=only)) if only else model(batch)[tokens]
        (rows * torch.linspace(-1, 1, rows.numel(), dtype=torch.float64).view_as(rows)).sum().backward()
        results.append((rows.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (full, full_grads), (short, short_grads) = results
    assert short.shape == (3, 32)
    assert (full - short).abs().max() < 1e-12
    for name, grad in full_grads.items():
        assert (grad - short_grads[name]).abs().max() < 1e-11, name
        assert grad.abs().max() > 0, name


@MASKS
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("only", [None, "last"])
def test_projecting_each_distinct_token_once_changes_nothing(is_causal, layers, only, monkeypatch):
    model = random_model(tiny_config(is_causal=is_causal, num_hidden_layers=layers), torch.float64, deviation=0.3)
    batch = PackedBatch.pack([[5, 5, 7, 5], [7], [], [9, 7, 5, 9, 5, 5]])
    results = []
    for share in (True, False):
        if not share:
            monkeypatch.setattr(decoder, "distinct", lambda ids: (ids, None))
        assert (decoder.distinct(batch.input_ids_T)[1] is not None) == share
        model.zero_grad()
        rows = model(batch, only=only)
        (rows * torch.linspace(-1, 1, rows.numel(), dtype=torch.float64).view_as(rows)).sum().backward()
        results.append([rows.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 5
    for once, each in zip(*results, strict=True):
        assert (once - each).abs().max() < 1e-11


@pytest.mark.parametrize("only", [None, "last"])
def test_checkpointing_changes_no_gradient(only):
    model = random_model(tiny_config(), deviation=0.3)
    batch = PackedBatch.pack(random_ids([5, 30], 384))
    grads = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        model(batch, only=only).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(plain, again) for plain, again in zip(*grads, strict=True))


def test_checkpointing_keeps_fewer_activations():
    model = random_model(tiny_config(num_hidden_layers=4))
    batch = PackedBatch.pack(random_ids([40], 384))
    kept = []
    for model.checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            model(batch)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


def test_empty_batches_and_empty_sequences():
    model = random_model(tiny_config())
    assert model(PackedBatch.pack([])).shape == (0, 32)
    assert model(PackedBatch.pack([[], []]), only="last").shape == (0, 32)
    ids = random_ids([6], 384)
    with torch.no_grad():
        alone, beside = (model(PackedBatch.pack(rows)) for rows in (ids, [[], *ids, []]))
    assert torch.equal(alone, beside)


def test_gradients_by_finite_differences():
    model = random_model(tiny_config(hidden_size=16, intermediate_size=8, head_dim=8), torch.float64, deviation=0.3)
    batch = PackedBatch.pack(random_ids([3, 2], 384))
    names = ["layers.0.self_attn.q_norm.weight", "layers.1.self_attn.k_norm.weight", "layers.0.input_layernorm.weight"]
    parameters = dict(model.named_parameters())

    def forward(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (batch,))

    assert torch.autograd.gradcheck(forward, [parameters[name].detach().requires_grad_() for name in names])


def test_names_are_those_of_hugging_face():
    names = set(build_decoder(tiny_config(num_hidden_layers=1)).state_dict())
    layer = {"input_layernorm", "post_attention_layernorm"}
    layer |= {f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
    layer |= {f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")}
    assert names == {f"layers.0.{part}.weight" for part in layer} | {"embed_tokens.weight", "norm.weight"}


@MASKS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("only", [None, "last"])
def test_boundaries_spare_products_and_change_no_bit(is_causal, dtype, only):
    model = random_model(tiny_config(is_causal=is_causal), dtype, deviation=0.3)
    batch = PackedBatch.pack([*random_ids([5, 30], 384), [], *random_ids([1], 384)])
    boundaries, results, products = Boundaries(), [], []
    for layer in model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.register_forward_hook(lambda *_: products.append(1))
    with torch.no_grad():
        first = model(batch, only=only, boundaries=boundaries)
    assert len(boundaries.layers) == 2
    assert len(products) == 4
    for known in (None, boundaries):
        products.clear()
        model.zero_grad()
        rows = model(batch, only=only, boundaries=known)
        (rows * torch.linspace(-1, 1, rows.numel(), dtype=dtype).view_as(rows)).sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert torch.equal(rows, first)
        assert len(products) == (0 if known else 4)
    plain, spared = results
    assert plain.keys() == spared.keys()
    assert len(plain) > 20
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    for name, grad in plain.items():
        assert (grad - spared[name]).norm() <= tolerance * grad.norm(), name


def test_boundaries_under_autocast_and_checkpointing():
    model = random_model(tiny_config(), deviation=0.3)
    batch, results = PackedBatch.pack(random_ids([5, 30], 384)), []
    for use, model.checkpointing in ((False, False), (True, False), (True, True)):
        model.zero_grad()
        boundaries = Boundaries()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            if use:
                with torch.no_grad():
                    model(batch, boundaries=boundaries)
            rows = model(batch, boundaries=boundaries if use else None)
        rows.square().sum().backward()
        results.append((rows.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (rows, grads), *others = results
    for other_rows, other_grads in others:
        assert torch.equal(rows, other_rows)
        assert (grads - other_grads).norm() < 0.02 * grads.norm()
