"""The text settings of a model folder outside of tokenizer.json: maximum length, lowercasing, the end of a text."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from pyqemb.data.folder import Rule, check_keys, one_of, read_json, read_object, shown
from pyqemb.errors import CheckpointError, DataError

# sentence-transformers reads the first of these that exists.
SENTENCE_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)  # fmt: skip
# Classes that both transformers 4.57 and 5 load from the same tokenizer.json.
CLASSES = (
    "PreTrainedTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast",
    "GPT2Tokenizer", "GPT2TokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast",
)  # fmt: skip


@dataclass(frozen=True)
class TextSettings:
    """`max_length` None: no limit. `append_end` False: tokenizer.json determines the end of texts."""

    max_length: int | None = None
    lower_case: bool = False
    append_end: bool = True


def read_text_settings(
    folder: Path, backend: tokenizers.Tokenizer, transformer: Mapping[str, Rule] | None = None
) -> TextSettings:
    """Read sentence_bert_config.json (or one of its older names) and tokenizer_config.json.

    Args:
        folder: the model folder.
        backend: the tokenizer of the folder's tokenizer.json, which the settings must agree with.
        transformer: rules for some settings of sentence_bert_config.json that differ from those of embedding models.

    Raises:
        CheckpointError: an unknown setting, or one that contradicts the tokenizer; the error names file, key and value.
    """
    name = next((name for name in SENTENCE_CONFIGS if (folder / name).is_file()), SENTENCE_CONFIGS[0])
    sentence, tokenizer = read_object(folder, name), read_object(folder, "tokenizer_config.json")
    check_keys(sentence, {**_SENTENCE, **(transformer or {})}, folder / name)
    check_keys(tokenizer, _TOKENIZER, folder / "tokenizer_config.json")
    _check_normalizer(tokenizer, backend, folder / "tokenizer_config.json")
    adds_bos = tokenizer.get("add_bos_token") and _token(tokenizer.get("bos_token"))
    if adds_bos and backend.encode("a").tokens[:1] != [adds_bos]:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: add_bos_token true is not supported: tokenizer.json does not add "
            f"{adds_bos!r}"
        )
    prefix_space = tokenizer.get("add_prefix_space")
    if prefix_space is not None and backend.pre_tokenizer is not None:
        other = b'"add_prefix_space":false' if prefix_space else b'"add_prefix_space":true'
        if other in backend.pre_tokenizer.__getstate__():
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'}: add_prefix_space {prefix_space} is not what tokenizer.json does"
            )
    as_stored = read_json(folder, "modules.json") is not None and not tokenizer.get("add_eos_token")
    return TextSettings(
        _max_length(folder, name, sentence, tokenizer), bool(sentence.get("do_lower_case")), append_end=not as_stored
    )


def _check_normalizer(tokenizer: Mapping[str, Any], backend: tokenizers.Tokenizer, path: Path) -> None:
    """CheckpointError unless the settings of BERT's normalizer are those of tokenizer.json."""
    state = {} if backend.normalizer is None else json.loads(backend.normalizer.__getstate__())
    stages = state.get("normalizers", [state])
    own: dict[str, Any] = next((stage for stage in stages if stage.get("type") == "BertNormalizer"), {})
    for name, key in _NORMALIZER.items():
        value, done = tokenizer.get(name), own.get(key)
        if done is None:  # strip_accents is that of lowercase
            done = own.get("lowercase", False)
        if value not in (None, done):
            raise CheckpointError(f"{path}: {name} {value} is not supported: it is not what tokenizer.json does")


def _max_length(folder: Path, name: str, sentence: dict[str, Any], tokenizer: dict[str, Any]) -> int | None:
    """Return the maximum length in tokens, determined as in sentence-transformers 6.

    It is `max_seq_length`, else `model_max_length` of the tokenizer, at most the number of positions of the model.
    """
    own = sentence.get("max_seq_length")
    if own is not None and (type(own) is not int or own < 1):
        raise DataError(f"{folder / name}: max_seq_length must be a positive number, got {shown(own)}")
    if own is not None:
        return own
    limits = [tokenizer.get("model_max_length"), read_object(folder, "config.json").get("max_position_embeddings")]
    found = [int(limit) for limit in limits if limit is not None and _is_length(limit)]
    return min(found) if _is_length(limits[0]) else None


def _is_length(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 1


def _token(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


_NORMALIZER = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}  # in tokenizer_config.json, and in the normalizer of tokenizer.json
_FLAG: Rule = lambda value: value is None or isinstance(value, bool)  # noqa: E731
_NOTHING: Rule = lambda value: not value  # noqa: E731
_TEXT_MODALITY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
_SENTENCE: dict[str, Rule | None] = {
    "max_seq_length": None,  # read
    "do_lower_case": _FLAG,  # read
    "transformer_task": one_of("feature-extraction"),
    "modality_config": one_of(_TEXT_MODALITY),
    "module_output_name": one_of("token_embeddings", None),
    "unpad_inputs": _FLAG,  # the layout of batches
    **dict.fromkeys(
        ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs",
         "processing_kwargs", "query_length", "document_length", "query_expansion", "tokenizer_name_or_path"), _NOTHING
    ),
}  # fmt: skip
_TOKENIZER: dict[str, Rule | None] = {
    "model_max_length": lambda value: value is None or _is_length(value),  # read
    "add_bos_token": _FLAG,  # compared with tokenizer.json
    "add_eos_token": _FLAG,  # read
    "add_prefix_space": _FLAG,  # compared with tokenizer.json
    "truncation_side": one_of("right", None),
    "split_special_tokens": one_of(False, None),
    "do_lower_case": _FLAG,  # compared with tokenizer.json, as the next two
    "strip_accents": _FLAG,
    "tokenize_chinese_chars": _FLAG,
    "do_basic_tokenize": one_of(True, None),
    "never_split": one_of([], None),
    "fix_mistral_regex": one_of(False, None),
    "trust_remote_code": one_of(False, None),
    "token": one_of(None),
    "use_auth_token": one_of(False, None),
    "auto_map": None,  # model folders with one are rejected, see pyqemb.model.safety
    **dict.fromkeys(
        # Names of tokens that are in tokenizer.json, and settings of decoding, padding and chats; the ids of a text do
        # not depend on them.
        ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "image_token",
         "video_token", "audio_token", "vision_bos_token", "vision_eos_token", "additional_special_tokens",
         "extra_special_tokens", "model_specific_special_tokens", "added_tokens_decoder", "tokenizer_class",
         "processor_class", "chat_template", "response_template", "response_schema", "clean_up_tokenization_spaces",
         "spaces_between_special_tokens", "padding_side", "padding", "pad_to_multiple_of", "pad_token_type_id",
         "pad_token_id", "errors", "legacy", "use_default_system_prompt", "use_fast", "backend",
         "is_local", "local_files_only", "name_or_path", "tokenizer_file", "vocab_file", "merges_file",
         "special_tokens_map_file", "model_input_names", "sp_model_kwargs", "from_slow", "max_length", "max_len",
         "stride", "truncation", "truncation_strategy", "return_token_type_ids", "return_tensors", "init_inputs",
         "init_kwargs", "verbose", "revision", "vocab_size", "transformers_version", "_commit_hash", "unsloth_fixed",
         "unsloth_template", "fill_token", "prefix_token", "device_map",
         "cache_dir", "force_download", "resume_download", "proxies", "subfolder", "torch_dtype", "dtype",
         "low_cpu_mem_usage", "middle_token", "suffix_token", "eot_token", "suffix_first"), None
    ),
}  # fmt: skip
