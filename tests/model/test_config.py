"""config.json in every spelling that is met, and refusals of what would silently change the arithmetic."""

import json

import pytest

from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.model.families import parse_config, read_config
from pyqemb.testing.tiny import tiny_config

# Qwen3-Embedding-4B as released, which has a head_dim that is not hidden / heads.
RELEASED = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151665,
}


def without(*names: str) -> dict:
    return {name: value for name, value in RELEASED.items() if name not in names}


def test_a_released_config_keeps_everything():
    config = parse_config(RELEASED)
    assert config.head_dim == 128
    assert config.is_causal
    assert config.rope_theta == 1_000_000
    written = config.to_dict()
    assert {**RELEASED, **written} == written | {"rope_scaling": None}
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 1_000_000}
    assert parse_config(written) == config


def test_the_rotary_base_is_found_at_both_places():
    inner = {"rope_type": "default", "rope_theta": 5e5}
    assert parse_config(without("rope_theta") | {"rope_parameters": inner}).rope_theta == 5e5
    with pytest.raises(ConfigError, match="rope_theta is given twice with different values"):
        parse_config(RELEASED | {"rope_parameters": inner})
    with pytest.raises(ConfigError, match="missing rope_theta"):
        parse_config(without("rope_theta"))


def test_the_mask_is_stored_and_read_back():
    assert not parse_config(RELEASED | {"is_causal": False}).is_causal
    assert not parse_config(RELEASED | {"use_bidirectional_attention": True}).is_causal
    written = tiny_config(is_causal=False).to_dict()
    assert written["is_causal"] is False
    assert written["use_bidirectional_attention"] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gemma"},
            "model_type must be one of qwen3, qwen2, llama, mistral, bert, roberta, xlm-roberta, distilbert, got "
            "'gemma'",
        ),
        ({"attention_bias": "yes"}, "attention_bias must be true or false"),
        ({"use_sliding_window": True}, "use_sliding_window is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types may hold 'full_attention' only"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4}},
            "rope type must be one of default, linear, llama3, yarn, got 'dynamic'",
        ),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            "factor of rope type 'linear' must be a positive number, got None",
        ),
        ({"rope_parameters": 3}, "rope_parameters must be an object"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "'auto_map' is refused"),
        ({"_attn_implementation_internal": "org/kernel"}, "'_attn_implementation_internal' is refused"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive whole number, got 0"),
        ({"hidden_size": "big"}, "hidden_size must be a positive whole number, got 'big'"),
        ({"vocab_size": True}, "vocab_size must be a positive whole number"),
        ({"num_key_value_heads": 7}, "must be a multiple of num_key_value_heads"),
        ({"head_dim": 12}, "head_dim must be a multiple of 8 up to 256, got 12"),
        ({"head_dim": 512}, "head_dim must be a multiple of 8 up to 256, got 512"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"rope_theta": "1e6"}, "rope_theta must be a positive number"),
        ({"is_causal": None}, "is_causal must be true or false"),
    ],
)
def test_what_would_change_the_arithmetic_is_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(RELEASED | change)
    (tmp_path / "config.json").write_text(json.dumps(RELEASED | change))
    if change.get("rms_norm_eps"):
        message = "NaN is not a number in JSON"  # refused by the reader already
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        read_config(tmp_path)


def test_missing_sizes_are_named():
    with pytest.raises(ConfigError, match="missing hidden_size, head_dim"):
        parse_config(without("hidden_size", "head_dim"))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[1]"])
def test_unreadable_files_are_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(tmp_path)
