"""pyqemb and sentence-transformers behind one interface: train for a number of steps, return the model and the time.

Time is CPU time of the process with all of its threads (and of child processes), from the start of the call to the end
of the last step: reading the pairs, tokenization and training, without saving. Other programs on the machine then take
nothing from it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from starts import Start

from pyqemb.data.example import Example
from pyqemb.model.embedder import Embedder
from pyqemb.model.protocols import VectorEncoder
from pyqemb.training import Callback, stage2, train

TEMPERATURE = 0.05  # the default of sentence-transformers, scale 20
BETAS, DECAY, WARMUP = (0.9, 0.95), 0.01, 0.05  # of both


def cpu_seconds() -> float:
    """CPU time of this process, its threads and its finished children."""
    return sum(os.times()[:4])


@dataclass
class Clock:
    """CPU seconds from its creation to the end of each step."""

    start: float = field(default_factory=cpu_seconds)
    ends: list[float] = field(default_factory=list)

    def step_ends(self) -> None:
        self.ends.append(cpu_seconds() - self.start)

    @property
    def per_step(self) -> float:
        """Mean seconds of the steps after the first one, which also reads the data."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


@dataclass(frozen=True)
class Recipe:
    """What the search chooses."""

    loss: str
    batch: int
    rate: float


class Trainer(Protocol):
    """One of the two trainers."""

    name: str
    losses: tuple[str, ...]

    def train(
        self, base: Path, pairs: Sequence[Example], recipe: Recipe, start: Start, *, steps: int, seed: int, out: Path
    ) -> tuple[VectorEncoder, Clock]:
        """The trained model, and the times of its steps."""
        ...


class Pyqemb:
    """`pyqemb.training.train`."""

    name = "pyqemb"
    losses = ("qwen3", "mnrl")

    def train(
        self, base: Path, pairs: Sequence[Example], recipe: Recipe, start: Start, *, steps: int, seed: int, out: Path
    ) -> tuple[VectorEncoder, Clock]:
        clock = Clock()

        class StepEnds(Callback):
            def on_step_end(self, row: dict[str, Any]) -> None:
                clock.step_ends()

        config = stage2(
            model={"base": str(base), "max_length": start.max_length},
            data=[{"rows": list(pairs)}],
            lora={"rank": 16, "alpha": 32.0} if start.lora else None,
            loss={"preset": recipe.loss, "temperature": TEMPERATURE},
            train={
                "steps": steps, "global_batch_size": recipe.batch, "num_negatives": 0, "seed": seed,
                "learning_rate": recipe.rate, "schedule": "linear", "warmup": WARMUP, "betas": BETAS,
                "weight_decay": DECAY, "tokens_per_chunk": start.tokens_per_chunk, "log_every": 10**6,
            },
            save={"dir": str(out), "every": None},
        )  # fmt: skip
        folder = train(config, callbacks=[StepEnds()], progress="off").folder
        return Embedder.from_pretrained(folder), clock


class SentenceTransformers:
    """`SentenceTransformerTrainer` with the loss for pairs, plain or with cached gradients."""

    name = "sentence-transformers"
    losses = ("plain", "cached")

    def train(
        self, base: Path, pairs: Sequence[Example], recipe: Recipe, start: Start, *, steps: int, seed: int, out: Path
    ) -> tuple[VectorEncoder, Clock]:
        from datasets import Dataset
        from sentence_transformers import (
            SentenceTransformer,
            SentenceTransformerTrainer,
            SentenceTransformerTrainingArguments,
        )
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss,
            MultipleNegativesRankingLoss,
        )
        from transformers import TrainerCallback

        clock = Clock()

        class StepEnds(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.step_ends()

        model = SentenceTransformer(str(base), device="cpu")
        if start.lora:
            from peft import LoraConfig

            model.add_adapter(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        scale = 1 / TEMPERATURE
        loss = (
            MultipleNegativesRankingLoss(model, scale=scale)
            if recipe.loss == "plain"
            else CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_num_tokens=start.tokens_per_chunk)
        )
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(out), max_steps=steps, per_device_train_batch_size=recipe.batch, seed=seed,
            learning_rate=recipe.rate, lr_scheduler_type="linear", warmup_steps=max(round(WARMUP * steps), 1),
            adam_beta1=BETAS[0], adam_beta2=BETAS[1], weight_decay=DECAY, max_grad_norm=1.0,
            batch_sampler="no_duplicates", save_strategy="no", logging_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        rows = Dataset.from_dict({"query": [e.query for e in pairs], "positive": [e.positive for e in pairs]})
        SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=rows, loss=loss, callbacks=[StepEnds()]
        ).train()
        return _Peer(model.eval()), clock


class _Peer:
    """A SentenceTransformer as a VectorEncoder."""

    def __init__(self, model: Any):
        self.model = model

    def encode_query(
        self, texts: Sequence[str], *, instruction: str | None = None, dim: int | None = None
    ) -> np.ndarray:
        return self._vectors(texts)

    def encode_document(self, texts: Sequence[str], *, dim: int | None = None) -> np.ndarray:
        return self._vectors(texts)

    def _vectors(self, texts: Sequence[str]) -> np.ndarray:
        found = self.model.encode(list(texts), batch_size=64, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(found, dtype=np.float32)


TRAINERS: tuple[Trainer, ...] = (Pyqemb(), SentenceTransformers())
