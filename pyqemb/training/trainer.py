"""The training loop: batch, cached gradients, clip, step, log; evaluate, save, stop and resume at step boundaries."""

import json
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyqemb import __version__
from pyqemb.data.files import atomic_file
from pyqemb.data.loader import TokenCache, build_batch
from pyqemb.errors import CheckpointError, ConfigError, Interrupted, PyqembError
from pyqemb.model.embedder import Embedder
from pyqemb.training.config import TrainConfig, load_config
from pyqemb.training.grad_cache import GradCache
from pyqemb.training.loss import ContrastiveLoss
from pyqemb.training.optim import Optimizer, learning_rate
from pyqemb.training.progress import Progress
from pyqemb.training.sets import make_loader, read_sets
from pyqemb.training.setup import load_model, pick_precision, seed_everything
from pyqemb.training.signals import StopRequest
from pyqemb.training.state import (
    Checkpoint,
    find,
    locked,
    random_states,
    remove_leftovers,
    restore_random_states,
)

Evaluate = Callable[[Embedder], dict[str, float]]
OnStep = Callable[[dict[str, Any]], None]
# A resumed run may change these; anything else would make it another run.
_FREE = {"eval", "save", "train.log_every", "train.tensorboard", "train.steps", "train.epochs", "train.max_bad_steps"}


@dataclass(frozen=True)
class TrainResult:
    """`folder` is the portable model of the last step, `best` that of the best evaluation (None without one)."""

    folder: Path
    best: Path | None
    steps: int
    metrics: list[dict[str, Any]]


def train(
    config: TrainConfig | str | Path,
    *,
    evaluate: Evaluate | None = None,
    on_step: OnStep | None = None,
    resume: str | Path | None = None,
) -> TrainResult:
    """Train a model and write it to `save.dir`/final.

    Args:
        config: a TrainConfig, or a TOML or YAML file.
        evaluate: called with the Embedder every `eval.every` steps and at the end; returns numbers by name.
        on_step: called after each step with its row of metrics.jsonl.
        resume: "auto" continues from the newest sound checkpoint of `save.dir`, a path from that one, None starts anew.

    Raises:
        ConfigError, DataError, CheckpointError: something is wrong with the input; nothing was trained.
        Interrupted: SIGTERM or SIGINT came; a checkpoint was saved, `resume="auto"` continues bit by bit.
    """
    config = config if isinstance(config, TrainConfig) else load_config(config)
    with StopRequest() as stop, locked(Path(config.save.dir)):
        run = Run(config, resume)
        with Progress(run.folder, run.steps, run.step, config.train.tensorboard) as progress:
            run.loop(progress, stop, evaluate, on_step)
    return run.result()


class Run:
    """One training run: what it holds, and one step of it."""

    def __init__(self, config: TrainConfig, resume: str | Path | None = None):
        self.config, self.folder = config, Path(config.save.dir)
        self.checkpoints = self.folder / "checkpoints"
        remove_leftovers(self.checkpoints)
        checkpoint = find(self.checkpoints, resume, warn=lambda text: print(text, file=sys.stderr))
        self.embedder = load_model(config)
        sets = read_sets(config)
        self.fingerprint = sets.fingerprint
        if len(sets.instructions) == 1:  # what the model is trained with is what encode_query should say
            (self.embedder.default_instruction,) = sets.instructions
        self.loader = make_loader(sets, config)
        self.tokens = TokenCache(self.embedder.tokenizer)
        self.steps = config.train.steps or math.ceil(config.train.epochs * self.loader.steps_per_epoch)
        precision = pick_precision(config.train.precision, self.embedder.device)
        self.optimizer = Optimizer(self.embedder, config.train, precision)
        self.step, self.bad_steps = 0, 0
        self.best: dict[str, Any] | None = None  # {"metric", "value", "step"} of the best evaluation
        self.metrics: list[dict[str, Any]] = []
        seed_everything(config.train.seed)
        if checkpoint is not None:
            self._continue_from(checkpoint)
        self._write_notes()

    def loop(self, progress: Progress, stop: StopRequest, evaluate: Evaluate | None, on_step: OnStep | None) -> None:
        """Step until the end; at step boundaries evaluate, save, and leave when asked to."""
        saved = self.step
        while self.step < self.steps and stop.name is None:
            row = self.train_step(progress)
            if on_step is not None:
                on_step(row)
            if evaluate is not None and (self._due(self.config.eval.every) or self.step == self.steps):
                self.evaluate(evaluate, progress)
            if self._due(self.config.save.every) or self.step == self.steps:
                self.save(progress)
                saved = self.step
        if self.step < self.steps:
            if saved < self.step:
                self.save(progress)
            raise Interrupted(
                f"stopped by {stop.name} after step {self.step} of {self.steps}, saved; continue with --resume auto"
            )
        self.embedder.save_pretrained(self.folder / "final", provenance=self.provenance())

    def train_step(self, progress: Progress) -> dict[str, Any]:
        """Batch -> gradients -> weights. A loss or gradient that is not finite leaves the weights as they were."""
        config = self.config
        batch = build_batch(self.loader.batch(self.step), self.tokens, own_rows=config.loss.preset == "classification")
        loss_fn = ContrastiveLoss(batch, config.loss)
        cache = GradCache(self.embedder, loss_fn, config.train.tokens_per_chunk)
        self.optimizer.zero_grad()
        loss = float(cache.step(batch.queries, batch.documents))
        norm = self.optimizer.clip()
        rate = learning_rate(self.step, self.steps, config.train)
        healthy = math.isfinite(loss) and math.isfinite(norm)
        if healthy:
            self.optimizer.step(rate)
        name, number = self.loader.where(self.step)
        self.step += 1
        row = {
            "step": self.step,
            "loss": loss if healthy else None,
            **(loss_fn.stats if healthy else {"skipped": True}),
            "grad_norm": norm if healthy else None,
            "learning_rate": rate,
            "set": name,
            "tokens": batch.num_tokens,
            "tokens_per_second": round(progress.count(batch.num_tokens)),
        }
        if self.step % config.train.log_every == 0 or self.step == self.steps or not healthy:
            progress.log(row)
        self.metrics.append(row)
        self._count_bad_step(
            healthy, f"step {self.step} (set {name!r}, batch {number}): loss {loss}, gradient norm {norm}", progress
        )
        return row

    def evaluate(self, evaluate: Evaluate, progress: Progress) -> None:
        """Measure the model; keep its folder as `best` when the metric has never been higher."""
        self.embedder.eval()
        values = {name: float(value) for name, value in evaluate(self.embedder).items()}
        self.embedder.train()
        if not values:
            return
        row = {"step": self.step, "eval": values}
        self.metrics.append(row)
        progress.log(row)
        metric = self.config.eval.metric or next(iter(values))
        if metric not in values:
            raise ConfigError(f"eval.metric: {metric!r} is not among what was measured: {', '.join(values)}")
        if math.isfinite(values[metric]) and (self.best is None or values[metric] > self.best["value"]):
            self.best = {"metric": metric, "value": values[metric], "step": self.step}
            self.embedder.save_pretrained(self.folder / "best", provenance=self.provenance())

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, its metrics first."""
        progress.sync()
        state = {
            "config": self.config.model_dump(mode="json"),
            "data": self.fingerprint,
            "random": random_states(),
            "best": self.best,
            "bad_steps": self.bad_steps,
        }
        weights = {name: weight.detach().contiguous().cpu() for name, weight in self.optimizer.weights.items()}
        moments = {name: value.contiguous().cpu() for name, value in self.optimizer.state_tensors().items()}
        Checkpoint(self.step, weights, moments, state).save(self.checkpoints, self.config.save.keep)

    def provenance(self) -> dict[str, Any]:
        return {
            "trained_by": f"pyqemb {__version__}",
            "base": self.config.model.base,
            "stage": self.config.stage,
            "step": self.step,
            "data": self.fingerprint,
        }

    def result(self) -> TrainResult:
        best = self.folder / "best" if self.best is not None else None
        return TrainResult(self.folder / "final", best, self.step, self.metrics)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _count_bad_step(self, healthy: bool, what: str, progress: Progress) -> None:
        """Steps that are not finite are left out; too many in a row end the run, the last checkpoint intact."""
        self.bad_steps = 0 if healthy else self.bad_steps + 1
        if not healthy:
            progress.say(f"left out {what}")
        if self.bad_steps >= self.config.train.max_bad_steps:
            raise PyqembError(
                f"stopped after {self.bad_steps} steps in a row that were not finite, the last: {what}; "
                f"earlier checkpoints in {self.checkpoints} are intact"
            )

    def _continue_from(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        changed = _differences(state["config"], self.config.model_dump(mode="json"))
        if changed:
            raise ConfigError(f"cannot resume with another configuration: {'; '.join(changed)}")
        if state["data"] != self.fingerprint:
            raise ConfigError("cannot resume: the training data are not those of the checkpoint")
        if set(checkpoint.weights) != set(self.optimizer.weights):
            raise CheckpointError(f"step {checkpoint.step}: its tensors are not those of {self.config.model.base}")
        self.optimizer.load(checkpoint.weights, checkpoint.optimizer)
        restore_random_states(state["random"])
        self.step, self.best, self.bad_steps = checkpoint.step, state["best"], state["bad_steps"]

    def _write_notes(self) -> None:
        """config.resolved.json and env.json: what was run, and where."""
        environment = {
            "pyqemb": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.platform(),
            "device": _described(self.embedder.device),
            "precision": str(self.embedder.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "arguments": sys.argv,
        }
        notes = {"config.resolved.json": self.config.model_dump(mode="json"), "env.json": environment}
        for name, content in notes.items():
            with atomic_file(self.folder / name) as temporary:
                temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _described(device: torch.device) -> str:
    return f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    """What changed between two configurations, apart from what a resumed run may change."""
    if path in _FREE:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [x for key in keys for x in _differences(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))]
    return [] if before == now else [f"{path} was {before!r}, now {now!r}"]
