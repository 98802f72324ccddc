"""A tiny Qwen3 and a tiny byte-level tokenizer, made on the spot: for tests and benchmarks."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file

from pyqemb.data.tokenizer import END_TOKEN, Tokenizer
from pyqemb.model.config import DecoderConfig
from pyqemb.model.embedder import Embedder
from pyqemb.model.families import FAMILIES

TEXTS = (
    "The capital of China is Beijing.",
    "Gravity is a force that attracts two bodies towards each other.",
    "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:What is gravity?",
    "Wie drucke ich ein Dokument?",
    "Sélectionnez Fichier - Imprimer pour ouvrir la boîte de dialogue.",
    "印刷するには、[ファイル]メニューを開きます。",
    "选择“文件”菜单中的“打印”。",
    "def slerp(a, b, t):\n    return a * (1 - t) + b * t",
    "",
    "x",
)


def tiny_config(model_type: str = "qwen3", **changes: Any) -> DecoderConfig:
    """Two layers, hidden 32, 4 query heads over 2 key heads of 16 (encoders: 4 of 8); arguments replace fields."""
    sizes = dict(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rope_theta=10_000.0,
        eos_token_id=tiny_tokenizer().end_id,
    )
    family = FAMILIES[model_type].config
    if family.is_encoder:
        sizes |= dict(num_key_value_heads=4, head_dim=8, is_causal=False)
        del sizes["rope_theta"]
    return family(**{**sizes, **changes})


def tiny_tokenizer(max_length: int | None = 128) -> Tokenizer:
    """A byte-level BPE of at most 384 tokens, always the same one."""
    return Tokenizer(tokenizers.Tokenizer.from_str(_tokenizer_json()), max_length)


def answering_tokenizer() -> tokenizers.Tokenizer:
    """The same as a causal language model has it: with the tokens yes and no, and nothing appended."""
    backend = tokenizers.Tokenizer.from_str(_tokenizer_json())
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    backend.add_tokens(["yes", "no"])
    return backend


def tiny_embedder(seed: int = 0, pooling: str = "last", **changes: Any) -> Embedder:
    """An untrained Embedder on `tiny_config(**changes)`."""
    return Embedder.from_config(tiny_config(**changes), tiny_tokenizer(), seed=seed, pooling=pooling)


def write_tiny_folder(
    folder: str | Path,
    seed: int = 0,
    prefix: bool = False,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """A plain Hugging Face model folder as a base model comes: config, weights (one file or shards), tokenizer.json.

    `prefix` writes a causal language model, as a reranker needs it: `model.` before each name, an lm_head, and a
    tokenizer with the tokens yes and no that does not append the end token.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    embedder = tiny_embedder(seed, **changes)
    (folder / "config.json").write_text(json.dumps(embedder.config.to_dict()))
    tokenizer = answering_tokenizer() if prefix else tokenizers.Tokenizer.from_str(_tokenizer_json())
    tokenizer.save(str(folder / "tokenizer.json"))
    stored_name = embedder.model.family.stored_name
    weights = {stored_name(name): tensor.to(dtype) for name, tensor in embedder.model.state_dict().items()}
    if prefix:
        weights = {f"model.{name}": tensor for name, tensor in weights.items()}
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    home = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(weights)}
    for file in set(home.values()):
        save_file(
            {name: weights[name] for name in weights if home[name] == file}, folder / file, metadata={"format": "pt"}
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    return folder


@cache
def _tokenizer_json() -> str:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[END_TOKEN, "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend.to_str()
