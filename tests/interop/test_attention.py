"""attn_implementation="pyqemb" against "eager": padded, packed and cached, causal, full and across; its arguments, one
by one.
"""

import pytest
import torch

import pyqemb
from pyqemb.interop import attention
from pyqemb.interop.attention_layout import layout_of_mask

transformers = pytest.importorskip("transformers")
causal_mask_function = transformers.masking_utils.causal_mask_function
pyqemb.register_transformers()

SIZES = dict(
    vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, attention_dropout=0.0, pad_token_id=0,
    sliding_window=None,
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
    assert ((a - b) * (weights != 0)).abs().max() < 1e-5
    assert a.abs().max() > 0.5
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
    with pytest.raises(ValueError, match="another mask with a window or chunks of 4 tokens: load"):
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
        attention._attend(ours, *(torch.zeros(1, 2, 20, 8),) * 3, None, sliding_window=4)


def encoder_decoder(**changes):
    """(eager, pyqemb) of BART."""
    sizes = dict(
        vocab_size=101, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0, max_position_embeddings=64,
        pad_token_id=0,
    )  # fmt: skip
    config = transformers.BartConfig(**{**sizes, **changes})
    both = []
    for implementation in ("eager", "pyqemb"):
        torch.manual_seed(0)
        model = transformers.BartForConditionalGeneration._from_config(config, attn_implementation=implementation)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.2)
        both.append(model.eval())
    return both


@pytest.mark.parametrize("length", [4, 20])
@pytest.mark.parametrize("padding", PADDING)
def test_cross_attention(padding, length):
    eager, ours = encoder_decoder()
    mask = PADDING[padding]
    inputs = dict(
        input_ids=IDS, decoder_input_ids=IDS[:, :length], attention_mask=None if mask is None else mask.long()
    )
    (a, da), (b, db) = ((m(**inputs).logits, m) for m in (eager, ours))
    assert (a - b).abs().max() < 1e-4 * a.abs().max()
    for logits in (a, b):
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    for (name, p), q in zip(da.named_parameters(), db.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-4 * max(p.grad.abs().max(), 1), name


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_of_an_encoder_decoder(cache):
    answers = [
        model.generate(
            IDS, attention_mask=PADDING["right"].long(), max_new_tokens=6, min_new_tokens=6, do_sample=False,
            num_beams=1, cache_implementation=cache, disable_compile=True,
        )
        for model in encoder_decoder()
    ]  # fmt: skip
    assert torch.equal(*answers)


def bert(implementation):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        attention_probs_dropout_prob=0.0
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def test_bidirectional_over_a_cache():
    logits = []
    for implementation in ("eager", "pyqemb"):
        model, cache = bert(implementation), transformers.DynamicCache()
        logits.append(
            [model(IDS[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in ((0, 8), (8, 11), (11, 12))]
        )
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(*logits, strict=True))


def test_chunks_after_a_cache():
    """Prompts that are read in pieces, with padding at their start."""
    hidden = []
    for model in models("qwen3"):
        cache, mask = transformers.DynamicCache(), PADDING["left"].long()
        pieces = [
            model(IDS[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, use_cache=True).last_hidden_state
            for a, b in ((0, 8), (8, 14), (14, 20))
        ]
        hidden.append(torch.cat(pieces, 1) * mask[..., None])
    assert (hidden[0] - hidden[1]).abs().max() < 1e-5


def test_values_narrower_than_queries():
    """Multi-head latent attention."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 24), torch.randn(2, 4, 5, 24), torch.randn(2, 4, 5, 16)
    layer = torch.nn.Identity()
    found, _ = attention._attend(layer, q, k, v, None, scaling=0.2, is_causal=False)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.2).transpose(1, 2)
    assert (found - wanted).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"\[pyqemb\] expected values no wider than queries, 16, got 24"):
        attention._attend(layer, v, v, q, None, is_causal=False)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("position_bias", torch.zeros(1, 4, 20, 20), "a tensor of shape [1, 4, 20, 20]"),
        ("sinks", torch.zeros(4), "a tensor of shape [4]"),
        ("s_aux", torch.zeros(4), "a tensor of shape [4]"),
        ("softcap", 30.0, "30.0"),
        ("head_mask", torch.ones(4), "a tensor of shape [4]"),
        ("indices", torch.ones(4), "a tensor of shape [4]"),
        ("output_attentions", True, "True"),
        ("never_heard_of", 0, "0"),
    ],
)
def test_unknown_arguments_are_refused(name, value, shown):
    _, ours = models("llama")
    with pytest.raises(ValueError, match="is not supported") as refused:
        ours(IDS, **{name: value})
    assert str(refused.value) == f"[pyqemb] {name} is not supported, got {shown}"


def test_arguments_that_change_nothing():
    eager, ours = models("llama")
    given = dict(
        num_items_in_batch=torch.tensor(3),
        token_type_ids=IDS * 0,
        softcap=None,
        output_attentions=False,
        head_mask=None,
    )
    assert_equal(eager, ours, torch.randn(3, 20, 64), input_ids=IDS, **given)


def test_dropout_counts_in_training_alone():
    """Some layers hand over their probability in evaluation too."""
    q = torch.randn(1, 2, 5, 8)
    layer = torch.nn.Identity().eval()
    attention._attend(layer, q, q, q, None, dropout=0.1, is_causal=False)
    with pytest.raises(ValueError, match=r"\[pyqemb\] dropout is not supported, got 0.1"):
        attention._attend(layer.train(), q, q, q, None, dropout=0.1, is_causal=False)


def test_lengths_beside_positions():
    """As DataCollatorWithFlattening gives them: both, in agreement."""
    eager, ours = models("qwen3")
    positions = torch.cat([torch.arange(n) for n in (12, 1, 7)])[None]
    cu = torch.tensor([0, 12, 13, 20], dtype=torch.int32)
    inputs = dict(input_ids=IDS[:1], position_ids=positions, max_length_q=12, max_length_k=12)
    assert_equal(eager, ours, torch.randn(1, 20, 64), **inputs, cu_seq_lens_q=cu, cu_seq_lens_k=cu)
    with pytest.raises(ValueError, match=r"\[pyqemb\] cu_seq_lens_q differs from the sequences of the attention mask"):
        ours(IDS[:1], cu_seq_lens_q=cu, cu_seq_lens_k=cu)
    with pytest.raises(ValueError, match=r"\[pyqemb\] cu_seq_lens_q and cu_seq_lens_k must be given together"):
        ours(IDS[:1], attention_mask={"full_attention": None}, cu_seq_lens_q=cu)


def test_layers_that_the_mask_is_not_for():
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
    layer = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"\[pyqemb\] no attention mask was made for a layer that is causal"):
        attention._attend(layer, q, q, q, None, is_causal=True)
    mask = layout_of_mask(1, 5, 5, mask_function=causal_mask_function)
    with pytest.raises(ValueError, match=r"is for \(rows, queries, keys\) \(1, 5, 5\), the layer has \(1, 5, 7\)"):
        attention._attend(layer, q, k, k, mask)


def test_models_that_never_call_it_are_refused():
    sizes = dict(vocab_size=99, d_model=32, n_layer=1, n_head=4, d_inner=48)
    config = transformers.XLNetConfig(**sizes)
    told = r"^\[pyqemb\] XLNetModel has its own attention that does not call transformers' attention functions"
    with pytest.raises(ValueError, match=told):
        transformers.AutoModel.from_config(config, attn_implementation="pyqemb")
    free = transformers.AutoModel.from_config(transformers.XLNetConfig(**sizes))
    assert free.config._attn_implementation == "eager"


def test_models_made_in_a_notebook():
    """Their class has no source; its parent decides."""
    made = type("Mine", (transformers.LlamaModel,), {"__module__": "nowhere"})
    config = transformers.LlamaConfig(**SIZES)
    assert made._from_config(config, attn_implementation="pyqemb")(IDS).last_hidden_state.shape == (3, 20, 64)


def test_registering_twice_checks_once():
    before = transformers.PreTrainedModel.get_correct_attn_implementation
    pyqemb.register_transformers()
    assert transformers.PreTrainedModel.get_correct_attn_implementation is before
