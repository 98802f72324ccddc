"""The training loop: batch, cached gradients, clip, step, log; evaluate, save, stop and resume at step boundaries."""

import json
import math
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyqemb import __version__
from pyqemb.data import mixing
from pyqemb.data.batch import PackedBatch, to_device
from pyqemb.data.files import atomic_file, locked
from pyqemb.data.loader import TrainingBatch
from pyqemb.errors import CheckpointError, ConfigError, Interrupted, PyqembError
from pyqemb.model.lora import save_adapter
from pyqemb.training import preflight
from pyqemb.training.config import TrainConfig, load_config
from pyqemb.training.distributed import World, joined
from pyqemb.training.grad_cache import GradCache
from pyqemb.training.grad_cache.passes import gradient_at
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
        evaluate: called with the Embedder (or Reranker) every `eval.every` steps and at the end; returns numbers by name. An
            attribute `metric_names` lets eval.metric be checked before the first step; pyqemb.evaluation.DevSets, which measures
            the datasets of the `eval` section, has it. Every rank gives one, the first calls it.
        on_step: called after each step with its row of metrics.jsonl.
        resume: "auto" continues from the newest sound checkpoint of `save.dir`, a path from that one, None starts anew. A folder
            with checkpoints or models of a run that would not be continued is refused.

    Raises:
        ConfigError, DataError, CheckpointError, MachineError: something is wrong with the input or the output folder, or a step
            does not fit into memory; nothing was trained.
        Interrupted: SIGTERM or SIGINT came; a checkpoint was saved unless no step was done, `resume="auto"` continues bit by bit.

    What `evaluate` or `on_step` raises goes on to the caller, after a checkpoint has been saved.
    """
    config = config if isinstance(config, TrainConfig) else load_config(config)
    preflight.check_place(Path(config.save.dir))
    with (
        StopRequest() as stop,
        joined(config.train.device, config.train.rank_timeout) as (world, device),
        locked(Path(config.save.dir), "training run") if world.is_first else nullcontext(),
    ):
        run = Run(config, resume, world, device, stop, evaluate)
        with run.progress() as progress:
            run.loop(progress, evaluate, on_step)
        return run.result()


class Run:
    """One training run: what it holds, and one step of it."""

    def __init__(
        self,
        config: TrainConfig,
        resume: str | Path | None,
        world: World,
        device: str,
        stop: StopRequest,
        evaluate: Evaluate | None = None,
    ):
        self.config, self.folder, self.world, self.stop = config, Path(config.save.dir), world, stop
        self.checkpoints = self.folder / "checkpoints"
        preflight.check_evaluation(config, evaluate)
        if world.is_first:
            remove_leftovers(self.folder)
        world.wait()  # the others look for checkpoints when the leftovers are gone
        checkpoint = find(self.folder, resume, warn=self.warn)
        if (step := checkpoint and checkpoint.step) != world.of_first(step):
            raise CheckpointError(f"{self.checkpoints}: process {world.rank} found step {step}, the first another one")
        self.model = load_model(config, device)
        sets = read_sets(config)
        self.fingerprint, self.objectives = sets.fingerprint, sets.objectives
        world.check_equal({"pyqemb": __version__, "data": self.fingerprint, **_flat(config.model_dump(mode="json"))})
        preflight.set_query_instruction(self.model, config, sets.instructions, evaluate)
        self.loader = make_loader(sets, config)
        self.tokens = token_cache(config, self.model.tokenizer)
        self.steps = num_steps(config, self.loader)
        preflight.warn_of_settings(config, self.model, sets, self.loader, self.steps)
        if len(sets.examples) > 1:
            self.warn("\n".join(mixing.lines(set_shares(self.loader, self.steps))))
        precision = pick_precision(config.train.precision, self.model.device)
        self.loss_parameters = LossParameters(config.loss).to(self.model.device)
        others = {f"loss.{name}": p for name, p in self.loss_parameters.named_parameters()}
        self.optimizer = Optimizer(self.model, config.train, precision, others)
        self.cache = GradCache(
            self.model, None, config.train.tokens_per_chunk, memory=config.train.memory, skip=config.train.skip_gradients,
            parameters=self.optimizer.weights.values(),
        )  # fmt: skip
        self.step, self.bad_steps = 0, 0
        self.stopping = False  # what all processes have agreed on
        self.results: dict[str, float] = {}  # of the last evaluation, for the model card
        self.best: dict[str, Any] | None = None  # {"metric", "value", "step"} of the best evaluation
        self.evaluations_since_best = 0
        self.saved_step = 0
        self.metrics: list[dict[str, Any]] = []
        seed_everything(config.train.seed)
        if checkpoint is not None:
            self._continue_from(checkpoint)
        self._preflight()
        if world.is_first:
            self._write_notes()

    def progress(self) -> Progress:
        if not self.world.is_first:
            return Silence()
        return Progress(self.folder, self.steps, self.step, self.config.train.tensorboard)

    def warn(self, text: str) -> None:
        if self.world.is_first:
            print(text, file=sys.stderr)

    def _preflight(self) -> None:
        """Refuse, on all ranks together, what the machine cannot hold."""
        error: PyqembError | None = None
        try:
            if self.world.is_first:
                weights = sum(4 * weight.numel() for weight in self.optimizer.weights.values())
                preflight.check_output(self.folder, 3 * weights)
                preflight.check_token_cache(self.config.train.token_cache)
            if self.step < self.steps:
                stream, _ = self._stream(self._batch(self.step))
                moments = preflight.pending_moments(self.optimizer)
                if stream.num_sequences:
                    preflight.check_memory(self.cache, stream, moments, self.model.device)
        except PyqembError as caught:
            error = caught
        failed = torch.zeros(self.world.size, device=self.model.device)
        failed[self.world.rank] = error is not None
        failed = self.world.sum(failed)
        if error is not None:
            raise error
        if failed.any():
            raise ConfigError(f"rank {int(failed.nonzero()[0])} cannot start, its message says why")

    def loop(self, progress: Progress, evaluate: Evaluate | None, on_step: OnStep | None) -> None:
        """Step until the end; at step boundaries evaluate, save, and leave when asked to."""
        patience = self.config.eval.patience
        early = patience is not None and self.evaluations_since_best >= patience
        if evaluate is not None and self.step == self.steps:
            self._measure(evaluate, progress)  # the run before may have been lost in its last evaluation
        while self.step < self.steps and not early and not self._asked_to_stop():
            row = self.train_step(progress)
            if on_step is not None and self.world.is_first:
                with self._saving_on_error("on_step", progress):
                    on_step(row)
            last = self.step == self.steps
            if evaluate is not None and (last or self._due(self.config.eval.every)):
                self._measure(evaluate, progress)
                if patience is not None:
                    early = self.world.of_first(self.evaluations_since_best >= patience)
            if last or early or self._due(self.config.save.every):
                self.save(progress)
        if self.step < self.steps and not early:
            self.save(progress)
            stopped = f"stopped by {self.stop.name or 'a signal'}"
            if not self.step:
                raise Interrupted(f"{stopped} before the first step; nothing is lost, --resume auto starts the run")
            raise Interrupted(f"{stopped} after step {self.step} of {self.steps}, saved; continue with --resume auto")
        if self.step and self.bad_steps == self.step:
            raise PyqembError(f"none of the {self.step} steps was finite: nothing was trained")
        if early and self.step < self.steps:
            self.warn(
                f"stopped after step {self.step} of {self.steps}: {self.evaluations_since_best} evaluations without a better value"
            )
        self._write_final()  # again where it was measured: the results are on its card
        self.world.wait()

    def _measure(self, evaluate: Evaluate, progress: Progress) -> None:
        """Evaluate on the first rank; after the last step the final model is written before, so that nothing costs it."""
        if not self.world.is_first:
            return
        if self.step == self.steps:
            with self._saving_on_error("writing the final model", progress):
                self._write_final()
        with self._saving_on_error("evaluate", progress):
            self.evaluate(evaluate, progress)

    def _write_final(self) -> None:
        if not self.world.is_first:
            return
        self.model.save_pretrained(self.folder / "final", provenance=self.provenance())
        if self.config.lora is not None:
            task = "CAUSAL_LM" if self.config.task == "rerank" else "FEATURE_EXTRACTION"
            save_adapter(self.model.model, self.folder / "adapter", self.config.model.base, task)

    @contextmanager
    def _saving_on_error(self, what: str, progress: Progress) -> Iterator[None]:
        """An exception inside the block costs no training: a checkpoint is saved, then it goes on its way."""
        try:
            yield
        except BaseException as error:
            self.model.train()
            message = f"{what} raised {type(error).__name__} after step {self.step} of {self.steps}"
            try:
                self.save(progress)
            except PyqembError as failed:
                self.warn(f"{message}, and a checkpoint could not be saved: {failed}")
            else:
                self.warn(f"{message}; saved to {self.checkpoints}, continue with --resume auto")
            raise

    def train_step(self, progress: Progress) -> dict[str, Any]:
        """Batch -> gradients -> weights. A loss or gradient that is not finite leaves the weights as they were, everywhere."""
        config = self.config
        name, number = self.loader.where(self.step)
        objective = self.objectives[name]
        batch = self._batch(self.step)
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
            with self._saving_on_error("writing metrics.jsonl", progress):
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
        stream, shares = self._stream(batch)
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

        forward = self.cache.forward(stream)
        embeddings_SE = forward.embeddings.requires_grad_()
        own_loss = loss_of_texts(embeddings_SE)
        facts = [float(own_loss.detach()), self.stop.name is not None, stream.num_tokens]
        message = torch.cat([torch.tensor(facts, dtype=torch.float64), loss_of.totals.cpu()])
        loss, stopping, tokens, *totals = world.sum(message.to(own_loss.device)).tolist()
        self.stopping = stopping > 0
        if math.isfinite(loss):
            self.cache.backward(forward, gradient_at(embeddings_SE, own_loss))
            world.sum_gradients(self.optimizer.holders)
        else:
            self.cache.discard(forward)
        return loss, int(tokens), torch.tensor(totals, dtype=torch.float64)

    def _batch(self, step: int) -> TrainingBatch:
        return batch_of(self.model, self.loader.batch(step), self.objectives[self.loader.where(step)[0]])

    def _stream(self, batch: TrainingBatch) -> tuple[PackedBatch, Sequence[np.ndarray]]:
        """The tokens of this rank's texts, and which texts are whose."""
        shares = batch.shares(self.world.size)
        return self.tokens.pack([batch.texts[text] for text in shares[self.world.rank]]), shares

    def _asked_to_stop(self) -> bool:
        """Alone at once; among others when all have heard of it."""
        return self.stopping if self.world.size > 1 else self.stop.name is not None

    def evaluate(self, evaluate: Evaluate, progress: Progress) -> None:
        """Measure the model; keep its folder as `best` when the metric has never been better."""
        section = self.config.eval
        self.model.eval()
        values = {name: float(value) for name, value in evaluate(self.model).items()}
        self.results = {name: value for name, value in values.items() if math.isfinite(value)}
        self.model.train()
        if values:
            row = {"step": self.step, "eval": {name: self.results.get(name) for name in values}}
            self.metrics.append(row)
            progress.log(row)
        metric = section.metric or next(iter(values), None)
        if metric is None:
            return
        if metric not in values:
            raise ConfigError(f"eval.metric: {metric!r} is not among what was measured: {', '.join(values)}")
        value = values[metric]
        before = None if self.best is None else self.best["value"]
        if math.isfinite(value) and (before is None or (value > before if section.mode == "max" else value < before)):
            self.evaluations_since_best = 0
            self.best = {"metric": metric, "value": value, "step": self.step}
            self.model.save_pretrained(self.folder / "best", provenance=self.provenance())
        else:
            self.evaluations_since_best += 1

    def save(self, progress: Progress) -> None:
        """Write a checkpoint of this step, its metrics first, unless there is one."""
        if not self.world.is_first or self.saved_step == self.step:
            return
        progress.sync()
        state = {
            "config": self.config.model_dump(mode="json"),
            "data": self.fingerprint,
            "random": random_states(),
            "best": self.best,
            "bad_steps": self.bad_steps,
            "evaluations_since_best": self.evaluations_since_best,
            "steps": self.steps,
        }
        weights = {name: weight.detach().contiguous().cpu() for name, weight in self.optimizer.weights.items()}
        moments = {name: value.contiguous().cpu() for name, value in self.optimizer.state_tensors().items()}
        Checkpoint(self.step, weights, moments, state).save(self.checkpoints, self.config.save.keep)
        self.saved_step = self.step

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
        """Steps that are not finite are left out; too many in a row, or all of a run, end it, the last checkpoint intact."""
        self.bad_steps = 0 if healthy else self.bad_steps + 1
        if not healthy:
            progress.say(f"left out {what}")
        if self.bad_steps >= min(self.config.train.max_bad_steps, self.steps):
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
        self.evaluations_since_best, self.saved_step = state["evaluations_since_best"], checkpoint.step
        if self.world.is_first:
            preflight.warn_of_changed_length(self.config, self.step, state["steps"], self.steps)

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
