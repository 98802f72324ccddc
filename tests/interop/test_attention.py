"""attn_implementation="pyqemb" against "eager": four decoders, padded, packed and cached, both masks, forward and backward."""

import pytest
import torch

import pyqemb

transformers = pytest.importorskip("transformers")
pyqemb.register_transformers()

SIZES = dict(
    vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, max_position_embeddings=128, attention_dropout=0.0, pad_token_id=0, sliding_window=None,
)  # fmt: skip
IDS = torch.arange(1, 61).view(3, 20)
PADDING = {
    "none": None,
    "right": torch.arange(20) < torch.tensor([[20], [7], [1]]),
    "left": torch.arange(20) >= torch.tensor([[0], [13], [19]]),
}


def models(name, **changes):
    """(eager, pyqemb) with the same weights."""
    torch.manual_seed(0)
    both = []
    for implementation in ("eager", "pyqemb"):
        config = transformers.AutoConfig.for_model(name, **{**SIZES, **changes})
        config._attn_implementation = implementation
        both.append(transformers.AutoModel.from_config(config))
    both[1].load_state_dict(both[0].state_dict())
    assert both[1].config._attn_implementation == "pyqemb"
    return both


def run(model, weights, **inputs):
    model.zero_grad()
    hidden = model(**inputs, use_cache=False).last_hidden_state
    (hidden * weights).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_equal(eager, ours, weights, **inputs):
    (a, da), (b, db) = run(eager, weights, **inputs), run(ours, weights, **inputs)
    assert ((a - b) * (weights != 0)).abs().max() < 1e-5 and a.abs().max() > 0.5
    for name, gradient in da.items():
        assert (gradient - db[name]).abs().max() <= 2e-5 * max(gradient.abs().max(), 1), name


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama", "mistral"])
def test_equals_eager(name, padding, is_causal):
    eager, ours = models(name, is_causal=is_causal)
    mask = PADDING[padding]
    weights = torch.randn(3, 20, 64)
    if mask is not None:
        weights *= mask[..., None]
    assert_equal(eager, ours, weights, input_ids=IDS, attention_mask=None if mask is None else mask.long())


def test_the_two_masks_differ():
    (_, causal), (_, full) = models("llama"), models("llama", is_causal=False)
    a, b = (model(IDS).last_hidden_state for model in (causal, full))
    assert (a - b).abs().max() > 0.1


def test_packed_by_positions():
    eager, ours = models("qwen2")
    positions = torch.cat([torch.arange(n) for n in (5, 1, 9, 5)])[None]
    assert_equal(eager, ours, torch.randn(1, 20, 64), input_ids=IDS[:1], position_ids=positions)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_packed_by_lengths(is_causal):
    """As flash attention is told; the mask that positions would make is not needed then."""
    eager, ours = models("qwen3", is_causal=is_causal)
    cu = torch.tensor([0, 12, 13, 20], dtype=torch.int32)
    positions = torch.cat([torch.arange(int(n)) for n in cu.diff()])[None]
    found = ours(
        IDS[:1], position_ids=positions, attention_mask={"full_attention": None}, cu_seq_lens_q=cu, cu_seq_lens_k=cu,
        max_length_q=12, max_length_k=12,
    )  # fmt: skip
    for first, last in zip(cu, cu[1:], strict=False):
        wanted = eager(IDS[:1, first:last]).last_hidden_state
        assert (found.last_hidden_state[:, first:last] - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache(padding, cache):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("llama", **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config)
    mask = PADDING[padding]
    options = dict(
        attention_mask=torch.ones_like(IDS) if mask is None else mask.long(), max_new_tokens=8, do_sample=False,
        cache_implementation=None if cache == "dynamic" else cache, disable_compile=True,
    )  # fmt: skip
    answers = []
    for implementation in ("eager", "pyqemb"):
        model.set_attn_implementation(implementation)
        answers.append(model.generate(IDS, **options))
    assert torch.equal(*answers)


def test_bfloat16_is_no_worse_than_eager():
    eager, ours = (model.bfloat16() for model in models("qwen3"))
    mask = PADDING["right"]
    a, b = (model(IDS, attention_mask=mask.long()).last_hidden_state for model in (eager, ours))
    exact = models("qwen3")[0].double()
    exact.load_state_dict({name: value.double() for name, value in eager.state_dict().items()})
    truth = exact(IDS, attention_mask=mask.long()).last_hidden_state
    errors = [((x - truth) * mask[..., None]).abs().max() for x in (a, b)]
    assert errors[1] <= 2 * errors[0]


def test_what_it_does_not_know_is_refused():
    _, windowed = models("mistral", sliding_window=4)
    with pytest.raises(ValueError, match=r"\[pyqemb\] expected causal or full attention inside sequences"):
        windowed(IDS)
    _, dropping = models("llama", attention_dropout=0.5)
    with pytest.raises(ValueError, match=r"\[pyqemb\] dropout is not supported, got 0.5"):
        dropping.train()(IDS)
    assert dropping.eval()(IDS).last_hidden_state.shape == (3, 20, 64)
    _, ours = models("llama")
    with pytest.raises(
        ValueError, match=r"expected a padding mask \[rows, tokens\] or none, got one of shape \[3, 1, 20, 20\]"
    ):
        ours(IDS, attention_mask=torch.zeros(3, 1, 20, 20))
    with pytest.raises(ValueError, match="shorter than the 20 tokens"):
        from pyqemb.interop.attention import _attend

        _attend(ours, *(torch.zeros(1, 2, 20, 8),) * 3, None, sliding_window=4)
