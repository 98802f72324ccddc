"""The training loop: batch, cached gradients, clip, step; evaluate, save, stop and resume at step boundaries."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from pyqemb import __version__
from pyqemb.data import mixing
from pyqemb.data.arguments import checked
from pyqemb.data.files import locked
from pyqemb.errors import ConfigError, Interrupted, PyqembError
from pyqemb.model.lora import save_adapter
from pyqemb.model.source import local_folder
from pyqemb.training import preflight
from pyqemb.training.agreement import check_same_data, check_same_model, check_same_settings, model_files, other_files
from pyqemb.training.callbacks import Callback, MetricsFile, StepFunction, Throughput, make_loggers, progress_callbacks
from pyqemb.training.callbacks.base import OnStep, Row, TrainInfo
from pyqemb.training.config import EvalSection, SaveSection, TrainConfig, load_config, with_data
from pyqemb.training.datasets import mixture, read_datasets
from pyqemb.training.evaluations import Evaluate, Evaluations
from pyqemb.training.grad_cache.passes import gradient_at, is_stochastic
from pyqemb.training.groups import checkpoint_bytes
from pyqemb.training.notes import write_notes
from pyqemb.training.objectives import LossParameters
from pyqemb.training.optim import learning_rate
from pyqemb.training.parallel.together import together
from pyqemb.training.parallel.world import World, is_of_a_collective, joined
from pyqemb.training.resume import check_continues
from pyqemb.training.saving import Saver
from pyqemb.training.setup import (
    build_cache,
    build_guide,
    build_optimizer,
    build_teacher,
    find_checkpoint,
    load_sharded_model,
    seed_everything,
)
from pyqemb.training.signals import StopRequest
from pyqemb.training.state import Checkpoint, random_states, restore_random_states
from pyqemb.training.steps import StepBatch, StepLoader, StepStats
from pyqemb.training.teacher import write_projection

log = logging.getLogger("pyqemb")
_PEFT_TASKS: dict[str, Literal["FEATURE_EXTRACTION", "CAUSAL_LM"]] = {
    "embedding": "FEATURE_EXTRACTION",
    "rerank": "CAUSAL_LM",
}


@dataclass(frozen=True, repr=False)
class TrainResult:
    """The result of `train`.

    Attributes:
        folder: the model folder of the last step.
        best: the model folder of the best evaluation; None without evaluations.
        steps: the number of steps of the run.
        metrics: the rows of metrics.jsonl that this call wrote.
    """

    folder: Path
    best: Path | None
    steps: int
    metrics: list[Row]

    def __repr__(self) -> str:
        losses = [row["loss"] for row in self.metrics if "loss" in row]
        loss = f", last loss {losses[-1]:.4f}" if losses else ""
        best = f", best model in {self.best}" if self.best is not None else ""
        return f"TrainResult({self.steps} steps{loss}, model in {self.folder}{best})"


@checked
def train(
    config: TrainConfig | str | Path,
    *,
    data: Any = None,
    evaluate: Evaluate | Mapping[str, Any] | None = None,
    on_step: OnStep | None = None,
    callbacks: Sequence[Callback] = (),
    resume: str | Path | None = None,
    progress: Literal["auto", "json", "off"] = "auto",
) -> TrainResult:
    """Train a model and save it to `save.dir`/final.

    Under torchrun the ranks share each batch and take the same steps as one process. They evaluate together; rank 0
    saves.

    Args:
        config: a TrainConfig, or a TOML or YAML file.
        data: the training data, if the configuration has none: a path, "hub://ORG/NAME", a Dataset or DatasetDict, a
            DataFrame, a list of dicts or Examples (see `read_examples`), {name: any of these}, or a list of `[[data]]`
            entries with `path` or `rows`. It must be the same on every rank.
        evaluate: called with the Embedder (or Reranker) every `eval.every` steps and at the end; returns numbers by
            name. An attribute `metric_names` lets eval.metric be checked before the first step;
            pyqemb.evaluation.DevSets, which measures the datasets of the `eval` section, has it. Every rank calls it:
            the ranks share the forward passes of `encode` and `score`, so `evaluate` has to call them with the same
            texts on every rank. The metrics of rank 0 are used. pyqemb.train also takes a dataset or {name: dataset}:
            folders, files, tables in memory or anything else that pyqemb.evaluate accepts; with names, the metrics are
            called NAME/METRIC. (Default: pyqemb.train measures the datasets of the `eval` section.)
        on_step: called after each step with its row of metrics.jsonl; short for a callback with `on_step_end`.
        callbacks: hooks of the run, pyqemb.training.Callback; rank 0 calls them.
        resume: "auto" continues from the newest intact checkpoint of `save.dir`, a path from that checkpoint; None
            starts from scratch. A folder with checkpoints or models of a run that would not be continued is an error.
        progress: "auto" shows a bar and evaluations on standard error if it is a terminal, otherwise a line for each
            logged step; "json" prints the rows of metrics.jsonl on standard output; "off" shows nothing.

    Returns:
        The model folders of the last step and of the best evaluation, and the metrics.

    Raises:
        ConfigError, DataError, CheckpointError, MachineError: the input or the output folder is invalid, or a step does
            not fit into memory; nothing was trained.
        Interrupted: SIGTERM or SIGINT was received; a checkpoint was saved unless no step was done, and `resume="auto"`
            continues bit for bit.

    Example:
        >>> from pyqemb.testing.tiny import write_tiny_folder
        >>> rows = [{"query": f"question {i}", "positive": f"answer {i}"} for i in range(8)]
        >>> settings = {"steps": 2, "global_batch_size": 4, "device": "cpu"}
        >>> config = pyqemb.stage1(model={"base": str(write_tiny_folder("base"))}, train=settings)
        >>> pyqemb.train(config, data=rows)
        TrainResult(2 steps, last loss ..., model in runs/run/final)

    If `evaluate`, `on_step` or a callback raises, a checkpoint is saved, and the exception propagates to the caller. If
    one rank raises, the other ranks raise a RankError that names the rank and the error.

    The logger "pyqemb" gets the messages of a run: warnings, and as INFO the mixture of the datasets and the memory
    plan. Of several ranks only rank 0 logs to it; the logger "pyqemb.rank" gets the messages about one rank.
    """
    if evaluate is not None and not callable(evaluate):
        raise ConfigError("evaluate: expected a function of the model; pyqemb.train takes datasets, also by name")
    config = with_data(config if isinstance(config, TrainConfig) else load_config(config), data)
    folder = Path(config.save.dir)
    hooks = [*callbacks, StepFunction(on_step)] if on_step is not None else list(callbacks)
    with (
        StopRequest() as stop,
        joined(config.train.device, config.train.rank_timeout) as (world, device),
        ExitStack() as held,
    ):
        with together(world):
            preflight.check_place(folder)
            if world.is_first:
                held.enter_context(locked(folder, "training run"))
        return Run(config, resume, world, device, stop, evaluate, hooks, progress).train()


class StepResult(NamedTuple):
    """The result of a step."""

    row: Row  # a row of metrics.jsonl
    skipped: str | None  # which step was skipped, and why; None: not skipped


class Run:
    """One training run: its parts, one step, and the loop over the steps."""

    def __init__(
        self,
        config: TrainConfig,
        resume: str | Path | None,
        world: World,
        device: str,
        stop: StopRequest,
        evaluate: Evaluate | None = None,
        callbacks: Sequence[Callback] = (),
        progress: str = "auto",
    ):
        self.config, self.folder, self.world, self.stop = config, Path(config.save.dir), world, stop
        self.checkpoints = self.folder / "checkpoints"
        check_same_settings(world, config, resume, evaluate)
        _, shards = config.parallel.mesh(world.size)
        preflight.check_evaluation(config, evaluate)
        shown = progress_callbacks(progress)
        with together(world):
            loggers = make_loggers(config) if world.is_first else []
        checkpoint = find_checkpoint(self.folder, resume, world, shards)
        check_same_model(world, "model.base", config.model.base)
        for name, section in config.other_models.items():
            check_same_model(world, f"{name}.model", section.model)
        with together(world):
            self.other_files = other_files(config)
        self.base_files: dict[str, str] | None = None
        if config.keeps_base:  # the checkpoints hold only what is trained
            with together(world):
                self.base_files = model_files(local_folder(config.model.base))
        self.model, self.sharding = load_sharded_model(config, device, world)
        with together(world):
            datasets = read_datasets(config)
            self.fingerprint = datasets.fingerprint
        check_same_data(world, datasets, self.fingerprint)
        preflight.set_query_instruction(self.model, config, datasets.instructions, evaluate)
        with together(world):
            preflight.check_caches(config)
            teacher, projection = build_teacher(config, self.model)
            guide = build_guide(config, self.model, datasets)
        self.parameters = LossParameters(config.loss, projection).to(self.model.device)
        self.batches = StepLoader(config, datasets, self.model, self.parameters, world, teacher, guide)
        self.steps = self.batches.steps
        preflight.warn_of_settings(config, self.model, datasets, self.batches.loader, self.steps)
        if len(datasets.examples) > 1:
            log.info("\n".join(mixing.lines(mixture(self.batches.loader, self.steps))))
        self.optimizer = build_optimizer(config, self.model, self.parameters, self.sharding)
        self.cache = build_cache(config, self.model, self.optimizer, self.sharding)
        self.evaluations = Evaluations(config.eval, evaluate)
        self.metrics_file = MetricsFile()
        self.callbacks: list[Callback] = [self.metrics_file, *loggers, *shown, *callbacks]
        self.throughput = Throughput()
        self.metrics: list[Row] = []
        self.step, self.bad_steps, self.saved_step = 0, 0, 0
        self.stopping = False  # the same on all ranks
        seed_everything(config.train.seed)
        if is_stochastic(self.model):
            torch.manual_seed(config.train.seed + world.rank)  # ranks with equal seeds would draw equal masks
        if checkpoint is not None:
            self._continue_from(checkpoint)
        self.saver = Saver(self.checkpoints, config.save.keep, world, self.step)
        with together(world):
            self._check_folders()
        self._check_memory()
        if world.is_first:
            write_notes(self.folder, config, self.model.device, self._dtype)

    def train(self) -> TrainResult:
        """Run the training, with its callbacks."""
        result: TrainResult | None = None
        begun: list[Callback] = []
        try:
            info = TrainInfo(self.config, self.folder, self.steps, self.step, str(self.model.device))
            for callback in self.callbacks if self.world.is_first else []:
                callback.on_train_begin(info)
                begun.append(callback)
            self.loop()
            best = self.folder / "best" if self.evaluations.best is not None else None
            result = TrainResult(self.folder / "final", best, self.step, self.metrics)
        finally:
            self.saver.leave()
            for callback in begun:
                callback.on_train_end(result)
        return result

    def loop(self) -> None:
        """Run the steps; at step boundaries evaluate, save, and stop after a signal."""
        early = self.evaluations.out_of_patience
        if self.evaluations.evaluate is not None and self.step == self.steps:
            self._evaluate()  # the previous run may have failed in its last evaluation
        while self.step < self.steps and not early and not self._asked_to_stop():
            self._end_step(self.train_step())
            self._finish_saving(wait=False)
            if self.evaluations.due(self.step, self.steps):
                self._evaluate()
                early = self.evaluations.out_of_patience
            if self.step == self.steps or early or self._due(self.config.save.every):
                self.save()
        self._finish_saving()
        if self.step < self.steps and not early:
            self.save()
            self._finish_saving()
            stopped = f"stopped by {self.stop.name or 'a signal'}"
            if not self.step:
                raise Interrupted(f"{stopped} before the first step; nothing is lost, --resume auto starts the run")
            raise Interrupted(f"{stopped} after step {self.step} of {self.steps}, saved; continue with --resume auto")
        if self.step and self.bad_steps == self.step:
            raise PyqembError(f"none of the {self.step} steps was finite: nothing was trained")
        if early and self.step < self.steps:
            log.info(
                "stopped after step %d of %d: %d evaluations without a better value",
                self.step, self.steps, self.evaluations.since_best,
            )  # fmt: skip
        with together(self.world):
            self._write_final()  # again after an evaluation: the model card has the results

    def train_step(self) -> StepResult:
        """Compute the gradients of a batch and update the weights.

        If the loss or the gradient is not finite on any rank, every rank skips the step.
        """
        train, world = self.config.train, self.world
        batch = self.batches.load(self.step)
        self.optimizer.zero_grad()
        forward = self.cache.forward(batch.stream)
        embeddings_SE = forward.embeddings.requires_grad_()
        part = batch.loss(embeddings_SE, world, ring=train.documents == "ring")
        stats = StepStats.reduce(part, self.stop.name is not None, batch.stream.num_tokens, world)
        norm = math.nan
        if stats.is_finite:
            self.cache.backward(forward, gradient_at(embeddings_SE, part.loss))
            (self.sharding or world).all_reduce_gradients(self.optimizer.grad_tensors)
            norm = self.optimizer.clip()
        else:
            self.cache.discard(forward)
        rate = learning_rate(self.step, self.steps, train)
        if math.isfinite(norm):
            self.optimizer.step(rate)
            self.optimizer.update_average(self.step + 1)
        self.step += 1
        self.stopping = stats.stop
        return self._result(batch, stats, norm, rate)

    def _result(self, batch: StepBatch, stats: StepStats, norm: float, rate: float) -> StepResult:
        """The row of metrics.jsonl for the step, skipped or not."""
        finite, skipped = math.isfinite(norm), None
        if finite:
            outcome: Row = dict(batch.stats(stats.totals))
        else:
            outcome = {"skipped": True, "rows": self.batches.loader.rows(self.step - 1)}
            skipped = (
                f"step {self.step} (dataset {batch.dataset!r}, batch {batch.number}, rows {outcome['rows']}): "
                f"loss {stats.loss}, gradient norm {norm}"
            )
        row: Row = {
            "step": self.step,
            "loss": stats.loss if finite else None,
            **outcome,
            "grad_norm": norm if finite else None,
            "learning_rate": rate,
            "dataset": batch.dataset,
            "tokens": stats.tokens,
            "tokens_per_second": round(self.throughput.count(stats.tokens)),
            "texts": len(batch.texts.texts),
            **self._cache_report(),
        }
        temperature = self.optimizer.extra_parameters.get("loss.log_temperature")
        if temperature is not None:
            row["temperature"] = float(temperature.detach().exp())
        return StepResult(row, skipped)

    def _cache_report(self) -> Row:
        """Columns about the gradient cache on this rank: its chunks, its memory if planned, skipped texts."""
        report, train = self.cache.last, self.config.train
        assert report is not None
        row: Row = {"chunks": report.chunks}
        if train.memory is not None:
            row |= {name: getattr(report, name) for name in ("kept", "predicted_bytes", "measured_bytes", "replans")}
        if train.skip_gradients:
            row |= {name: getattr(report, name) for name in ("skipped_texts", "skipped_tokens", "skipped_norm")}
        return row

    def _end_step(self, result: StepResult) -> None:
        """Report a step.

        Skipped steps do not change the weights. Too many in a row end the run; the last checkpoint stays intact.
        """
        row, skipped = result
        self.metrics.append(row)
        self.bad_steps = 0 if skipped is None else self.bad_steps + 1
        self._call("on_step_end", row)
        if skipped is not None:
            log.warning("skipped %s", skipped)
        if self.bad_steps >= min(self.config.train.max_bad_steps, self.steps):
            self._finish_saving()
            raise PyqembError(
                f"stopped after {self.bad_steps} steps in a row that were not finite, the last: {skipped}; "
                f"earlier checkpoints in {self.checkpoints} are intact"
            )

    def _evaluate(self) -> None:
        """Evaluate on all ranks, and save the best model as `best`. All ranks get the values of rank 0.

        After the last step the final model is saved first, so that a failed evaluation does not lose it.
        """
        if self.step == self.steps:
            with self._saving_on_error("writing the final model"):
                self._write_final()
        gathered = self.sharding.gathered() if self.sharding else nullcontext()
        with self._saving_on_error("evaluate"), self._weights_of(self.config.eval), gathered:
            values = self.evaluations.measure(self.model, self.world)
        if values:
            row = {"step": self.step, "eval": {name: self.evaluations.results.get(name) for name in values}}
            self.metrics.append(row)
            self._call("on_evaluate", row)
        with self._saving_on_error("evaluate"):
            if self.evaluations.is_best(values, self.step):
                self._write_model(self.folder / "best", self.config.eval)

    def _write_final(self) -> None:
        section = self.config.save
        self._write_model(self.folder / "final", section)
        if self.parameters.projection is not None and self.world.is_first:
            write_projection(self.folder / "teacher", self.parameters.projection)
        if self.config.lora is not None and (self.world.is_first or self.sharding):
            task = _PEFT_TASKS[self.config.task]
            with self._weights_of(section):
                save_adapter(self.model.model, self.folder / "adapter", self.config.model.base, task, self._dtype)

    def _weights_of(self, section: EvalSection | SaveSection) -> AbstractContextManager[None]:
        """Context in which the model has the weights that the section selects."""
        return self.optimizer.averaged() if self.config.uses_average(section) else nullcontext()

    def _write_model(self, folder: Path, section: EvalSection | SaveSection) -> None:
        """Write the portable model with the weights that the section selects; with sharded ones all ranks take part."""
        if self.world.is_first or self.sharding:
            with self._weights_of(section):
                self.model.save_pretrained(folder, dtype=self._dtype, provenance=self._provenance(section))

    @property
    def _dtype(self) -> torch.dtype:
        """The compute dtype of the model."""
        return self.sharding.dtype if self.sharding else self.model.dtype

    def save(self) -> None:
        """Write the metrics and a checkpoint of this step, unless it exists; may continue in the background."""
        if self.saved_step == self.step:
            return
        self._finish_saving()
        with together(self.world):
            if self.world.is_first:
                self.metrics_file.sync()
        background = self.config.save.background
        self.saver.start(
            self.step, self.optimizer.weights, self.optimizer.state_tensors(), self._state(),
            lambda folder: self.model.write_portable(folder, self._dtype, self._provenance(self.config.save)),
            copy=background,
        )  # fmt: skip
        self.saved_step = self.step
        if not background:
            self._finish_saving()

    def _finish_saving(self, wait: bool = True) -> None:
        """Handle a checkpoint that was completed; `wait`: wait until it is complete."""
        folder = self.saver.wait() if wait else self.saver.poll()
        if folder is not None:
            self._call("on_save", self.saved_step, folder)

    def _state(self) -> dict[str, Any]:
        """The content of state.json; the random states are those of all ranks."""
        base = {} if self.base_files is None else {"base": self.base_files}
        return {
            "config": self.config.model_dump(mode="json"),
            "data": self.fingerprint,
            "random": self.world.gather_object(random_states()),
            "best": self.evaluations.best,
            "bad_steps": self.bad_steps,
            "evaluations_since_best": self.evaluations.since_best,
            "steps": self.steps,
            **base,
            **self.other_files,
        }

    def _continue_from(self, checkpoint: Checkpoint) -> None:
        check_continues(
            checkpoint, self.config, self.fingerprint, self.optimizer.weights, self.base_files, self.other_files
        )
        state, random = checkpoint.state, checkpoint.state["random"]
        with together(self.world):
            self.optimizer.load(checkpoint.weights, checkpoint.optimizer, checkpoint.folder)
            if self.world.rank < len(random):  # a new rank keeps its own seed
                restore_random_states(random[self.world.rank], checkpoint.folder)
        self.step, self.saved_step, self.bad_steps = checkpoint.step, checkpoint.step, state["bad_steps"]
        self.evaluations.best, self.evaluations.since_best = state["best"], state["evaluations_since_best"]
        preflight.warn_of_changed_length(self.config, self.step, state["steps"], self.steps)

    def _check_folders(self) -> None:
        """Raise an error if an output folder cannot be written."""
        if self.world.is_first:
            preflight.check_output(self.folder, checkpoint_bytes(self.model, self.config.train))

    def _check_memory(self) -> None:
        """Raise an error if a step does not fit into memory."""
        if self.step == self.steps:
            return
        with together(self.world):
            stream = self.batches.load(self.step).stream
        with together(self.world):
            moments = preflight.pending_moments(self.optimizer)
            if stream.num_sequences or self.sharding:  # the ranks of a sharded model run its passes together
                preflight.check_memory(self.cache, stream, moments, self.model.device)

    def _call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of all callbacks on rank 0; after an exception a checkpoint is saved."""
        called: Callback | None = None
        with self._saving_on_error(lambda: called.describe(hook) if called else hook):
            for called in self.callbacks if self.world.is_first else []:
                getattr(called, hook)(*arguments)

    @contextmanager
    def _saving_on_error(self, what: str | Callable[[], str]) -> Iterator[None]:
        """If the block raises on any rank, every rank saves a checkpoint and raises."""
        try:
            with together(self.world):
                yield
        except BaseException as error:
            self.model.train()
            if is_of_a_collective(error):
                raise
            what = what if isinstance(what, str) else what()
            message = f"{what} raised {type(error).__name__} after step {self.step} of {self.steps}"
            try:
                with together(self.world):
                    self.save()
                    self._finish_saving()
            except PyqembError as failed:
                log.error("%s, and a checkpoint could not be saved: %s", message, failed)
            else:
                log.error("%s; saved to %s, continue with --resume auto", message, self.checkpoints)
            raise

    def _asked_to_stop(self) -> bool:
        """Whether to stop: after a signal for a single process, for several when all ranks have agreed."""
        return self.stopping if self.world.size > 1 else self.stop.name is not None

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _provenance(self, section: EvalSection | SaveSection) -> dict[str, Any]:
        averaged = {"weights": "ema"} if self.config.uses_average(section) else {}
        return {
            "trained_by": f"pyqemb {__version__}",
            "base": self.config.model.base,
            "stage": self.config.stage,
            "step": self.step,
            **averaged,
            "data": self.fingerprint,
            "results": self.evaluations.results,
        }
