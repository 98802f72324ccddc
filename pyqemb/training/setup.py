"""What a run starts from: the model on its device, its precision, the seeds."""

import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

from pyqemb.data.example import Example
from pyqemb.data.loader import TrainingBatch, build_batch, build_pairs
from pyqemb.errors import ConfigError
from pyqemb.model.embedder import Embedder
from pyqemb.model.lora import LoraConfig, add_lora
from pyqemb.model.reranker import Reranker
from pyqemb.training.config import TrainConfig

ModelT = TypeVar("ModelT", Embedder, Reranker)


def load_model(config: TrainConfig, device: str | None = None) -> Embedder | Reranker:
    """The base model in float32 on `device` (None: as configured); its Matryoshka dimensions are those of the loss."""
    model = config.model
    if config.task == "rerank":
        reranker = Reranker.from_pretrained(
            model.base,
            attention=model.attention,
            dtype=torch.float32,
            max_length=model.max_length,
            device=device or config.train.device,
        )
        return _prepared(reranker, config)
    embedder = Embedder.from_pretrained(
        model.base, attention=model.attention, pooling=model.pooling, dtype=torch.float32, max_length=model.max_length,
        device=device or config.train.device,
    )  # fmt: skip
    size = embedder.config.hidden_size
    if config.loss.matryoshka is not None:
        if max(config.loss.matryoshka) > size:
            raise ConfigError(f"loss.matryoshka: the model has {size} dimensions, got {max(config.loss.matryoshka)}")
        embedder.matryoshka = tuple(sorted(config.loss.matryoshka, reverse=True))
    return _prepared(embedder, config)


def _prepared(model: ModelT, config: TrainConfig) -> ModelT:
    model.model.checkpointing = config.train.activation_checkpointing
    if config.lora is not None:
        model.requires_grad_(False)
        add_lora(model.model, LoraConfig(**config.lora.model_dump()), seed=config.train.seed)
    return model.train()


def batch_of(model: Embedder | Reranker, examples: Sequence[Example], objective: str) -> TrainingBatch:
    """What a step on these examples takes."""
    if isinstance(model, Reranker):
        return build_pairs(examples, model.default_instruction)
    return build_batch(examples, model.tokenizer, own_rows=objective == "classification")


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `train.precision` on a device."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    if name == "float32" and device.type == "cuda":
        raise ConfigError("train.precision: the CUDA kernels compute attention in bfloat16, not in float32")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def seed_everything(seed: int) -> None:
    """python, numpy and torch. (The loader draws from generators of its own.)"""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
