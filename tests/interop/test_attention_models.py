"""attn_implementation="pyqemb" against "eager": the architectures of transformers, each equal or refused by name.

    python tests/interop/test_attention_models.py [NAME ...]

runs every architecture that can be built small, or those named. It prints a line for each: the largest differences, the
refusal, or why eager could not run. Last comes the table of `docs/how-to/transformers.md`.
"""

import collections
import contextlib
import copy
import functools
import logging
import re
import signal
import sys
import warnings

import pytest
import torch

import pyqemb
from pyqemb.interop import attention

transformers = pytest.importorskip("transformers", minversion="5")
pyqemb.register_transformers()
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

EQUAL = [
    "bart",
    "bert",
    "clip",
    "deepseek_v3",
    "gemma3_text",
    "gpt2",
    "m2m_100",
    "modernbert",
    "qwen3",
    "vit",
    "whisper",
]
EQUAL_SLOW = [
    "albert", "blenderbot", "camembert", "cohere2", "distilbert", "electra", "exaone4", "glm4", "gpt_neox", "granite",
    "hubert", "llama", "llama4_text", "marian", "mbart", "mllama", "nllb-moe", "olmo2", "opt", "paligemma", "pegasus_x",
    "phi", "phi3", "qwen2_5_vl", "qwen2_moe", "roberta", "smollm3", "starcoder2", "wav2vec2", "xlm-roberta",
]  # fmt: skip
REFUSED = {
    "bigbird_pegasus": "computes with its attention mask",
    "gemma2": r"softcap is not supported, got 50\.0",
    "git": "GitModel has its own attention",
    "gpt_oss": r"s_aux is not supported, got a tensor of shape \[4\]",
    "layoutlm": r"got one of shape \[3, 1, 1, 12\] that the model or its caller made",
    "mpnet": "MPNetModel has its own attention",
    "nemotron_asr_streaming": "expected causal or full attention inside sequences, got another mask",
    "t5": r"position_bias is not supported, got a tensor of shape \[1, 4, 12, 12\]",
    "xlnet": "XLNetModel has its own attention",
}

SMALL = {
    "vocab_size": 99, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "emb_dim": 32,
    "embedding_size": 32, "word_embed_proj_dim": 32, "projection_dim": 32, "proj_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "hidden_dim": 48, "n_inner": 48, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48, "intermediate_size_mlp": 48, "dense_intermediate_size": 48,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "depth": 2, "num_decoder_layers": 2, "num_encoder_layers": 2,
    "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "n_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "attention_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "d_kv": 8, "global_head_dim": 8, "attention_head_dim": 8,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "rotary_dim": 8, "qk_head_dim": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_source_positions": 64,
    "max_target_positions": 64, "image_size": 32, "patch_size": 8, "num_mel_bins": 16, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 99, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "hidden_dropout": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    "resid_pdrop": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "dropout_rate": 0.0,
    "layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "feat_proj_dropout": 0.0,
    "drop_path_rate": 0.0, "classifier_dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
LENGTH = 12
IDS = torch.arange(5, 5 + 3 * LENGTH).view(3, LENGTH)
MASKS = {
    "none": None,
    "right": (torch.arange(LENGTH) < torch.tensor([[12], [7], [2]])).long(),
    "left": (torch.arange(LENGTH) >= torch.tensor([[0], [5], [10]])).long(),
}


# Tried in turn: heads that share nothing (MLA), and head dimensions with room for multimodal rotary sections.
VARIANTS = [
    {},
    {"num_key_value_heads": 4},
    {"head_dim": 64},
    {"head_dim": 128, "hidden_size": 512},
    {"hidden_size": 512, "num_key_value_heads": 4},
    {"num_attention_heads": 2, "num_heads": 2, "num_key_value_heads": 1},
]


def shrink(config, **changes):
    """The config with every size that it has made small, its parts too."""
    for name in list(vars(config)):
        part = getattr(config, name, None)
        if isinstance(part, transformers.PreTrainedConfig):
            shrink(part, **changes)
    kinds = getattr(config, "layer_types", None)
    layers = 2
    if isinstance(kinds, list | tuple) and kinds:
        kinds = list(dict.fromkeys(kinds))
        layers = max(2, len(kinds))
        changes = changes | {"num_hidden_layers": layers}
    for name, value in {**SMALL, **changes}.items():
        try:
            old = getattr(config, name)
            null = name.endswith("token_id") or name in ("num_key_value_heads", "head_dim", "vocab_size")
            if (null and old is None) or (isinstance(old, int | float) and not isinstance(old, bool)):
                setattr(config, name, value)
        except Exception:
            continue
    if isinstance(kinds, list | tuple) and kinds:
        with contextlib.suppress(AttributeError):  # made from other settings
            config.layer_types = (kinds * 2)[:layers]
    return config


def pair(config):
    """(eager, pyqemb) with the same weights."""
    both = []
    for implementation in ("eager", "pyqemb"):
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
        both.append(model.float())
    with torch.no_grad():
        for parameter in both[0].parameters():
            if parameter.is_floating_point():
                parameter.normal_(0, 0.1)
    both[1].load_state_dict(both[0].state_dict())
    return both


def inputs_of(model, mask):
    """Inputs that the model may take, the likeliest first."""
    config = model.config
    ids = IDS if mask is None else IDS * mask
    if mask is not None:  # CLIP and its kind pool at the end token
        ids = ids.scatter(1, (mask * torch.arange(1, LENGTH + 1)).argmax(1, keepdim=True), 2)
    text = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 32)
    size = size if isinstance(size, int) else 32
    channels = getattr(vision, "num_channels", 3)
    image = {"pixel_values": torch.linspace(-1, 1, 3 * channels * size * size).sin().view(3, channels, size, size)}
    sound = {"input_values": torch.linspace(-1, 1, 3 * 2000).sin().view(3, 2000)}
    mel = {"input_features": torch.linspace(0, 50, 3 * 16 * 128).sin().view(3, 16, 128)}
    mels = {"input_features": mel["input_features"].transpose(1, 2)}
    main = model.main_input_name
    decoder = {"decoder_input_ids": IDS[:, :4]}
    choices = [text, text | decoder, text | image]
    if mask is None:
        choices = {
            "pixel_values": [image, image | text],
            "input_values": [sound, sound | decoder],
            "input_features": [mel, mels, mel | decoder, mels | decoder],
        }.get(main, []) + choices
    return choices


def outputs_of(model, inputs, **options):
    torch.manual_seed(0)  # some draw what they mask
    out = model(**inputs, **options)
    for name in ("last_hidden_state", "logits", "pooler_output", "logits_per_text", "image_embeds"):
        value = getattr(out, name, None)
        if isinstance(value, torch.Tensor):
            return value
    raise ValueError("no output")


def differs(a, b, kept=None):
    """By how much of the largest element."""
    if kept is not None and a.shape[:2] == kept.shape:
        a, b = (torch.where(kept.bool()[..., None], x, 0) for x in (a, b))
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))


def compare(eager, ours):
    """{case: difference, or the refusal}; raises where eager cannot run."""
    config, found = eager.config, {}
    for name, mask in MASKS.items():
        error = None
        for inputs in inputs_of(eager, mask):
            try:
                wanted = outputs_of(eager, inputs)
                break
            except Exception as failed:
                error = error or failed
        else:
            if name == "none":
                raise error
            continue
        if mask is not None and "attention_mask" not in inputs:
            continue
        kept = None if "decoder_input_ids" in inputs else mask
        try:
            for model in (eager, ours):
                model.zero_grad()
            a, b = outputs_of(eager, inputs), outputs_of(ours, inputs)
            found[name] = differs(a, b, kept)
            weights = torch.linspace(-1, 1, a.numel()).cos().view_as(a)
            if kept is not None and a.shape[:2] == kept.shape:
                weights = weights * kept[..., None]
            for value in (a, b):
                (value * weights).sum().backward()
            grads = [dict((n, p.grad) for n, p in m.named_parameters() if p.grad is not None) for m in (eager, ours)]
            if grads[0].keys() != grads[1].keys():
                found[name + " backward"] = 9.0
            largest = max(g.abs().max() for g in grads[0].values())
            found[name + " backward"] = max(
                float((g - grads[1][n]).abs().max() / largest) for n, g in grads[0].items() if n in grads[1]
            )
        except ValueError as refused:
            if "[pyqemb]" not in str(refused) and "[varlen_attention]" not in str(refused):
                raise
            found[name] = str(refused)
        del wanted
    if hasattr(eager, "prepare_inputs_for_generation") or not getattr(config, "is_encoder_decoder", False):
        try:
            results = []
            for model in (eager, ours):
                first = model(input_ids=IDS[:, :6], use_cache=True)
                cache = first.past_key_values
                second = model(input_ids=IDS[:, 6:10], past_key_values=cache, use_cache=True)
                third = model(input_ids=IDS[:, 10:11], past_key_values=second.past_key_values, use_cache=True)
                results.append(torch.cat([x.last_hidden_state for x in (first, second, third)], 1))
            found["cache"] = differs(*results)
        except ValueError as refused:
            found["cache"] = str(refused) if "[pyqemb]" in str(refused) else "-"
        except Exception as failed:
            found["cache"] = "-" if len(results) == 0 else f"ERROR {type(failed).__name__}: {failed}"
    return found


class TooLong(BaseException):
    pass


def _alarm(*_):
    raise TooLong


def small_pair(name):
    """`pair` of the first variant that eager can run."""
    error = None
    for changes in VARIANTS:
        try:
            config = shrink(transformers.AutoConfig.for_model(name), **changes)
            with torch.device("meta"):
                model = transformers.AutoModel.from_config(copy.deepcopy(config), attn_implementation="eager")
            count = sum(p.numel() for p in model.parameters())
            if count > 3e7:
                raise ValueError(f"{count} parameters")
            eager = (
                transformers.AutoModel.from_config(copy.deepcopy(config), attn_implementation="eager").eval().float()
            )
            for inputs in inputs_of(eager, None):
                try:
                    outputs_of(eager, inputs)
                    return pair(config)
                except Exception as failed:
                    if "[pyqemb]" in str(failed):
                        raise
                    error = error or failed
        except Exception as failed:
            if "[pyqemb]" in str(failed):
                raise
            error = error or failed
    raise error


@pytest.fixture
def calls(monkeypatch):
    """A list that grows with every call of the attention function."""
    calls = []

    def attend(*arguments, **options):
        calls.append(1)
        return attention._attend(*arguments, **options)

    transformers.AttentionInterface.register("pyqemb", attend)
    yield calls
    transformers.AttentionInterface.register("pyqemb", attention._attend)


def check_equal(name, calls):
    found = compare(*small_pair(name))
    assert calls
    assert "none" in found
    wrong = {
        case: value for case, value in found.items() if value != "-" and not (isinstance(value, float) and value < 1e-5)
    }
    assert not wrong


@pytest.mark.parametrize("name", EQUAL)
def test_equals_eager(name, calls):
    check_equal(name, calls)


@pytest.mark.deep
@pytest.mark.parametrize("name", EQUAL_SLOW)
def test_more_equal_eager(name, calls):
    check_equal(name, calls)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    with pytest.raises(ValueError, match=r"^\[pyqemb\] .*" + REFUSED[name]):
        open_and_run(name)


def open_and_run(name):
    _, ours = small_pair(name)
    outputs_of(ours, next(inputs for inputs in inputs_of(ours, None) if runs(ours.config, inputs)))


def runs(config, inputs):
    eager = transformers.AutoModel.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    try:
        outputs_of(eager, inputs)
    except Exception:
        return False
    return True


CALLS = []


def count_calls():
    """Register again, so that CALLS grows with every call of the attention function."""

    @functools.wraps(attention._attend)
    def attend(*arguments, **options):
        CALLS.append(1)
        return attention._attend(*arguments, **options)

    transformers.AttentionInterface.register("pyqemb", attend)


def main(names):
    logging.disable(50)
    warnings.simplefilter("ignore")
    count_calls()
    signal.signal(signal.SIGALRM, _alarm)
    if not names:
        from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

        names = sorted(MODEL_MAPPING_NAMES)
    outcomes = collections.defaultdict(list)
    for name in names:
        CALLS.clear()
        signal.alarm(40)
        try:
            found = compare(*small_pair(name))
            parts = [
                f"{key}={value:.1e}" if isinstance(value, float) else f"{key}={value}" for key, value in found.items()
            ]
            print(name, *parts, sep="\t", flush=True)
            outcomes[outcome(found, len(CALLS))].append(name)
        except (Exception, TooLong) as failed:
            refused = isinstance(failed, ValueError) and "[pyqemb]" in str(failed)
            print(name, type(failed).__name__, str(failed)[:200].replace("\n", " "), sep="\t", flush=True)
            outcomes[short(str(failed)) if refused else "not run"].append(name)
        finally:
            signal.alarm(0)
    print("\n| outcome | architectures |\n| --- | --- |")
    for kind, found in sorted(outcomes.items(), key=lambda item: -len(item[1])):
        print(f"| {kind} | {', '.join(found)} |")


def outcome(found, calls):
    differences = [value for value in found.values() if isinstance(value, float)]
    if not all(value < 1e-5 for value in differences) or any("ERROR" in str(value) for value in found.values()):
        return "other"
    refusals = [value for value in found.values() if isinstance(value, str) and value != "-"]
    if refusals:
        return short(refusals[0])
    return "equal" if calls else "no attention"


def short(refusal):
    """The sentence without what differs between architectures."""
    refusal = re.sub(r"^\[\w+\] |, got .*|: load it .*| \(\w+\)", "", refusal)
    return re.sub(r"^\w+ has an attention", "an attention", refusal)


if __name__ == "__main__":
    main(sys.argv[1:])
