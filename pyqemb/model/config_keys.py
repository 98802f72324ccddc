"""The settings of config.json that change no hidden state.

transformers and other libraries write them; saving a model writes them again.
"""

from typing import Any

from pyqemb.data.folder import Rule, one_of


def _list_of_counts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(type(item) is int and item > 0 for item in value))


HARMLESS: dict[str, Rule | None] = {
    "partial_rotary_factor": one_of(1, 1.0, None),
    "is_decoder": one_of(True, False, None),
    "is_encoder_decoder": one_of(False, None),
    "add_cross_attention": one_of(False, None),
    "cross_attention_hidden_size": one_of(None),
    "pruned_heads": one_of({}, None),
    "max_window_layers": lambda value: value is None or type(value) is int,  # used only with use_sliding_window
    "matryoshka_dimensions": _list_of_counts,
    "is_matryoshka": one_of(True, False, None),
    "sentence_transformers": lambda value: value is None or isinstance(value, dict),  # of a cross-encoder
    **dict.fromkeys(
        (  # Origin and storage of the model.
         "_name_or_path", "_commit_hash", "transformers_version", "transformers.js_config", "dtype", "torch_dtype",
         "model_name", "unsloth_fixed", "unsloth_version", "name_or_path", "license", "vocab_files", "tokenizer_class",
         "prefix", "use_bfloat16", "torchscript", "tf_legacy_loss", "base_model_name_or_path", "adapters",
         "base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "is_llama_config", "method",
         # Outputs of a call, and how they are computed.
         "use_cache", "output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate",
         "output_scores",
           "chunk_size_feed_forward", "pretraining_tp", "gradient_checkpointing", "use_flash_attn", "attention_dropout",
           "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "max_sequence_length", "seq_length", "seq_len",
           "tie_encoder_decoder", "_flash_attn_2_enabled", "neftune_noise_alpha", "cache_implementation",
           "_output_attentions",
         # Ids of tokens and heads on top of the hidden states.
         "bos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id",
         "decoder_start_token_id",
           "num_labels", "id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params",
           "classifier_dropout", "classifier_from_token", "is_original_qwen3_reranker", "pad_to_multiple_of",
         # Generation.
         "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
         "diversity_penalty",
           "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
           "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "forced_bos_token_id",
           "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
           "begin_suppress_tokens", "max_tokens"), None
    ),
}  # fmt: skip
