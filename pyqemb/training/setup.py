"""What a run starts from: the device, the model on it, the seeds."""

import random

import numpy as np
import torch

from pyqemb.errors import ConfigError
from pyqemb.model.embedder import Embedder
from pyqemb.training.config import TrainConfig


def pick_device(name: str) -> torch.device:
    """The device of `train.device`; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"train.device: {name!r} was asked for, but torch finds no CUDA device")
    return torch.device(name)


def load_model(config: TrainConfig, device: torch.device) -> Embedder:
    """The base model in the precision it is trained in; its Matryoshka dimensions are those of the loss."""
    precision = config.train.precision
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    model = config.model
    embedder = Embedder.from_pretrained(
        model.base, attention=model.attention, pooling=model.pooling, dtype=precision, max_length=model.max_length
    )
    size = embedder.config.hidden_size
    if config.loss.matryoshka is not None:
        if max(config.loss.matryoshka) > size:
            raise ConfigError(f"loss.matryoshka: the model has {size} dimensions, got {max(config.loss.matryoshka)}")
        embedder.matryoshka = config.loss.matryoshka
    embedder.model.checkpointing = config.train.activation_checkpointing
    return embedder.to(device).train()


def seed_everything(seed: int) -> None:
    """python, numpy and torch. (The loader draws from generators of its own.)"""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
