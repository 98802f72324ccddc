"""The training loop: batch, cached gradients, clip, step, log; evaluate, save, stop and resume at step boundaries."""

import json
import math
import platform
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyqemb import __version__
from pyqemb.data import mixing
from pyqemb.data.batch import to_device
from pyqemb.data.files import atomic_file
from pyqemb.data.loader import TrainingBatch
from pyqemb.errors import CheckpointError, ConfigError, Interrupted, PyqembError
from pyqemb.model.lora import save_adapter
from pyqemb.training.config import TrainConfig, load_config
from pyqemb.training.distributed import World, joined
from pyqemb.training.grad_cache import GradCache
from pyqemb.training.loss import BatchLoss, LossParameters, stats_of
from pyqemb.training.optim import Optimizer, learning_rate
from pyqemb.training.progress import Progress, Silence
from pyqemb.training.ring import Ring
from pyqemb.training.sets import make_loader, num_steps, read_sets, set_shares, token_cache
from pyqemb.training.setup import batch_of, load_model, pick_precision, seed_everything
from pyqemb.training.signals import StopRequest
from pyqemb.training.state import (
    Checkpoint,
    find,
    locked,
    random_states,
    remove_leftovers,
    restore_random_states,
)

Evaluate = Callable[[Any], dict[str, float]]  # of the Embedder or Reranker
OnStep = Callable[[dict[str, Any]], None]
# A resumed run may change these; anything else would make it another run.
_FREE = {
    "eval",
    "save",
    "train.log_every",
    "train.tensorboard",
    "train.max_bad_steps",
    "train.token_cache",
    "train.rank_timeout",
}
_LENGTH = {"train.steps", "train.epochs"}  # free too, unless the sets' shares depend on it


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

    Under torchrun the processes share each batch out and take the same steps as one would; the first writes and measures.

    Args:
        config: a TrainConfig, or a TOML or YAML file.
        evaluate: called with the Embedder (or Reranker) every `eval.every` steps and at the end; returns numbers by name.
        on_step: called after each step with its row of metrics.jsonl.
        resume: "auto" continues from the newest sound checkpoint of `save.dir`, a path from that one, None starts anew.

    Raises:
        ConfigError, DataError, CheckpointError: something is wrong with the input; nothing was trained.
        Interrupted: SIGTERM or SIGINT came; a checkpoint was saved, `resume="auto"` continues bit by bit.
    """
    config = config if isinstance(config, TrainConfig) else load_config(config)
    with (
        StopRequest() as stop,
        joined(config.train.device, config.train.rank_timeout) as (world, device),
        locked(Path(config.save.dir)) if world.is_first else nullcontext(),
    ):
        run = Run(config, resume, world, device, stop)
        with run.progress() as progress:
            run.loop(progress, evaluate, on_step)
        return run.result()


class Run:
    """One training run: what it holds, and one step of it."""

    def __init__(self, config: TrainConfig, resume: str | Path | None, world: World, device: str, stop: StopRequest):
        self.config, self.folder, self.world, self.stop = config, Path(config.save.dir), world, stop
        self.checkpoints = self.folder / "checkpoints"
        if world.is_first:
            remove_leftovers(self.checkpoints)
        world.wait()  # the others look for checkpoints when the leftovers are gone
        checkpoint = find(self.checkpoints, resume, warn=self.warn)
        if (step := checkpoint and checkpoint.step) != world.of_first(step):
            raise CheckpointError(f"{self.checkpoints}: process {world.rank} found step {step}, the first another one")
        self.model = load_model(config, device)
        sets = read_sets(config)
        self.fingerprint, self.objectives = sets.fingerprint, sets.objectives
        world.check_equal({"pyqemb": __version__, "data": self.fingerprint, **_flat(config.model_dump(mode="json"))})
        if len(sets.instructions) == 1:  # what the model is trained with is what it should say later
            self.model.default_instruction = next(iter(sets.instructions))
        self.loader = make_loader(sets, config)
        self.tokens = token_cache(config, self.model.tokenizer)
        self.steps = num_steps(config, self.loader)
        if len(sets.examples) > 1:
            self.warn("\n".join(mixing.lines(set_shares(self.loader, self.steps))))
        precision = pick_precision(config.train.precision, self.model.device)
        self.loss_parameters = LossParameters(config.loss).to(self.model.device)
        others = {f"loss.{name}": p for name, p in self.loss_parameters.named_parameters()}
        self.optimizer = Optimizer(self.model, config.train, precision, others)
        self.cache = GradCache(
            self.model, None, config.train.tokens_per_chunk, memory=config.train.memory, skip=config.train.skip_gradients,
            parameters=self.optimizer.weights.values(), agree=self._agree, say=self.warn,
        )  # fmt: skip
        self.step, self.bad_steps = 0, 0
        self.stopping = False  # what all processes have agreed on
        self.results: dict[str, float] = {}  # of the last evaluation, for the model card
        self.best: dict[str, Any] | None = None  # {"metric", "value", "step"} of the best evaluation
        self.metrics: list[dict[str, Any]] = []
        seed_everything(config.train.seed)
        if checkpoint is not None:
            self._continue_from(checkpoint)
        if world.is_first:
            self._write_notes()

    def progress(self) -> Progress:
        if not self.world.is_first:
            return Silence()
        return Progress(self.folder, self.steps, self.step, self.config.train.tensorboard)

    def warn(self, text: str) -> None:
        if self.world.is_first:
            print(text, file=sys.stderr)

    def loop(self, progress: Progress, evaluate: Evaluate | None, on_step: OnStep | None) -> None:
        """Step until the end; at step boundaries evaluate, save, and leave when asked to."""
        saved = self.step
        while self.step < self.steps and not self._asked_to_stop():
            row = self.train_step(progress)
            if on_step is not None and self.world.is_first:
                on_step(row)
            if (
                evaluate is not None
                and self.world.is_first
                and (self._due(self.config.eval.every) or self.step == self.steps)
            ):
                self.evaluate(evaluate, progress)
            if self._due(self.config.save.every) or self.step == self.steps:
                self.save(progress)
                saved = self.step
        if self.step < self.steps:
            if saved < self.step:
                self.save(progress)
            raise Interrupted(
                f"stopped by {self.stop.name or 'a signal'} after step {self.step} of {self.steps}, saved; "
                "continue with --resume auto"
            )
        if self.world.is_first:
            self.model.save_pretrained(self.folder / "final", provenance=self.provenance())
            if self.config.lora is not None:
                task = "CAUSAL_LM" if self.config.task == "rerank" else "FEATURE_EXTRACTION"
                save_adapter(self.model.model, self.folder / "adapter", self.config.model.base, task)
        self.world.wait()

    def train_step(self, progress: Progress) -> dict[str, Any]:
        """Batch -> gradients -> weights. A loss or gradient that is not finite leaves the weights as they were, everywhere."""
        config = self.config
        name, number = self.loader.where(self.step)
        objective = self.objectives[name]
        batch = batch_of(self.model, self.loader.batch(self.step), objective)
        self.optimizer.zero_grad()
        loss, tokens, totals = self._gradients(batch, objective)
        norm = self.optimizer.clip() if math.isfinite(loss) else math.nan
        rate = learning_rate(self.step, self.steps, config.train)
        healthy = math.isfinite(loss) and math.isfinite(norm)
        if healthy:
            self.optimizer.step(rate)
        row: dict[str, Any] = {
            "step": self.step + 1,
            "loss": loss if healthy else None,
            **(
                stats_of(totals, len(batch.positive))
                if healthy
                else {"skipped": True, "rows": self.loader.rows(self.step)}
            ),
            "grad_norm": norm if healthy else None,
            "learning_rate": rate,
            "set": name,
            "tokens": tokens,
            "tokens_per_second": round(progress.count(tokens)),
            "texts": len(batch.texts),
            **self._cache_report(),
        }
        if "loss.log_temperature" in self.optimizer.others:
            row["temperature"] = float(self.optimizer.others["loss.log_temperature"].detach().exp())
        self.step += 1
        if self.step % config.train.log_every == 0 or self.step == self.steps or not healthy:
            progress.log(row)
        self.metrics.append(row)
        what = f"step {self.step} (set {name!r}, batch {number}, rows {row.get('rows')}): loss {loss}, gradient norm {norm}"
        self._count_bad_step(healthy, what, progress)
        return row

    def _cache_report(self) -> dict[str, Any]:
        """What the gradient cache did, in this process: its chunks, its memory where that is planned, what it skipped."""
        report, train = self.cache.last, self.config.train
        assert report is not None
        row: dict[str, Any] = {"chunks": report.chunks}
        if train.memory is not None:
            row |= {name: getattr(report, name) for name in ("kept", "predicted_bytes", "measured_bytes", "replans")}
        if train.skip_gradients:
            row |= {name: getattr(report, name) for name in ("skipped_texts", "skipped_tokens", "skipped_norm")}
        return row

    def _gradients(self, batch: TrainingBatch, objective: str) -> tuple[float, int, torch.Tensor]:
        """The gradients of the batch, summed over the processes; its loss, tokens and totals of statistics."""
        world, device = self.world, self.model.device
        shares = batch.shares(world.size)
        stream = self.tokens.pack([batch.texts[text] for text in shares[world.rank]])
        loss_of = BatchLoss(batch, self.config.loss, objective, self.loss_parameters, world.share(len(batch.positive)))
        query_text, document_text = (to_device(x, device) for x in (batch.query_text, batch.document_text))
        ring = None
        if self.config.train.documents == "ring" and objective in ("info_nce", "classification"):
            ring = Ring(world, batch, shares, device)

        def loss_of_texts(own_SE: torch.Tensor) -> torch.Tensor:
            if ring is not None:
                return loss_of.around(ring, own_SE)
            vectors_SE = world.gather(own_SE, shares)
            return loss_of(vectors_SE.index_select(0, query_text), vectors_SE.index_select(0, document_text))

        self._message = lambda loss: torch.cat(
            [
                torch.tensor([float(loss), self.stop.name is not None, stream.num_tokens], dtype=torch.float64),
                loss_of.totals.cpu(),
            ]
        )
        self.cache.step_stream(stream, loss_of_texts)
        loss, stopping, tokens, *totals = self._agreed.tolist()
        self.stopping = stopping > 0
        if math.isfinite(loss):
            world.sum_gradients(self.optimizer.holders)
        return loss, int(tokens), torch.tensor(totals, dtype=torch.float64)

    def _agree(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss of the whole batch. What else the processes tell each other in a step goes with it."""
        self._agreed = self.world.sum(self._message(loss).to(loss.device)).cpu()
        return self._agreed[0]

    def _asked_to_stop(self) -> bool:
        """Alone at once; among others when all have heard of it."""
        return self.stopping if self.world.size > 1 else self.stop.name is not None

    def evaluate(self, evaluate: Evaluate, progress: Progress) -> None:
        """Measure the model; keep its folder as `best` when the metric has never been higher."""
        self.model.eval()
        values = {name: float(value) for name, value in evaluate(self.model).items()}
        self.results = {name: value for name, value in values.items() if math.isfinite(value)}
        self.model.train()
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
            self.model.save_pretrained(self.folder / "best", provenance=self.provenance())

    def save(self, progress: Progress) -> None:
        """Write a checkpoint, its metrics first."""
        if not self.world.is_first:
            return
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
            "results": self.results,
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
        free = _FREE | (set() if any(entry.max_epochs for entry in self.config.data) else _LENGTH)
        changed = _differences(state["config"], self.config.model_dump(mode="json"), free)
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
            "device": _described(self.model.device),
            "precision": str(self.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "arguments": sys.argv,
        }
        notes = {"config.resolved.json": self.config.model_dump(mode="json"), "env.json": environment}
        for name, content in notes.items():
            with atomic_file(self.folder / name) as temporary:
                temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _described(device: torch.device) -> str:
    return f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def _flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Every setting by its dotted name."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return flat


def _differences(before: Any, now: Any, free: set[str], path: str = "") -> list[str]:
    """What changed between two configurations, apart from what a resumed run may change."""
    if path in free:
        return []
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = (dict(enumerate(values)) for values in (before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [x for k in keys for x in _differences(before.get(k), now.get(k), free, f"{path}.{k}".lstrip("."))]
    return [] if before == now else [f"{path} was {before!r}, now {now!r}"]
