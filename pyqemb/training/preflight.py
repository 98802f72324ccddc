"""Checks before the first step, and in --dry-run.

They find errors that would otherwise end a run later, or make its evaluation wrong.
"""

import logging
import os
import shutil
import uuid
from pathlib import Path

import torch

from pyqemb.data.batch import PackedBatch
from pyqemb.data.files import atomic_folder, check_writable, kind_of_path
from pyqemb.data.loader import Loader
from pyqemb.data.machine import reason
from pyqemb.errors import ConfigError, MachineError
from pyqemb.model.embedder import Embedder
from pyqemb.model.reranker import Reranker
from pyqemb.model.shards import local
from pyqemb.training.config import TrainConfig
from pyqemb.training.datasets import Datasets, most_negatives
from pyqemb.training.evaluations import Evaluate
from pyqemb.training.grad_cache import GradCache
from pyqemb.training.grad_cache.memory import free_bytes
from pyqemb.training.groups import moment_bytes
from pyqemb.training.optim import Optimizer, learning_rate

_log = logging.getLogger("pyqemb")
_FEW_STEPS = 20  # with fewer steps a model learns almost nothing at usual learning rates


def set_query_instruction(
    model: Embedder | Reranker, config: TrainConfig, instructions: set[str | None], evaluate: Evaluate | None = None
) -> None:
    """Set the query prompt that is saved with the model.

    Evaluation uses it for queries without an instruction. The instruction is the first of: model.instruction; the one
    instruction that all data share; eval.instruction. Without any, the prompt of the base model is kept, with a
    warning.

    Args:
        model: its `default_instruction` is set.
        config: the configuration of the run.
        instructions: the instructions of all training rows; None for rows without one.
        evaluate: the evaluation; `needs_instruction` is true if some of its queries use the model's own prompt.

    Raises:
        ConfigError: the data have several instructions, none is configured, and evaluation depends on it.
    """
    if config.model.instruction is not None:
        model.default_instruction = config.model.instruction or None
        return
    if len(instructions) == 1 or config.eval.instruction is not None:
        model.default_instruction = next(iter(instructions)) if len(instructions) == 1 else config.eval.instruction
        return
    found = ", ".join(sorted("none" if instruction is None else repr(instruction) for instruction in instructions))
    if getattr(evaluate, "needs_instruction", False):
        raise ConfigError(
            f"eval.instruction: the data have several instructions ({found}); say which one the evaluation's queries "
            "get: set eval.instruction, or instruction of each dataset, or model.instruction"
        )
    _log.warning(
        "the data have several instructions (%s): the saved model keeps the query prompt of its base, %r; "
        "model.instruction chooses another",
        found, model.default_instruction,
    )  # fmt: skip


def check_evaluation(config: TrainConfig, evaluate: Evaluate | None) -> None:
    """Log settings of `eval` that are unused without `evaluate`.

    Raises:
        ConfigError: `evaluate` is known not to report eval.metric.
    """
    section = config.eval
    if evaluate is None:
        if given := unused_evaluation(config):
            _log.warning(
                "eval.%s: nothing is evaluated; give train(evaluate=...), for example "
                "pyqemb.evaluation.DevSets(config.eval, config.task)", given
            )  # fmt: skip
        return
    names = getattr(evaluate, "metric_names", None)
    if section.metric is not None and names is not None and section.metric not in names:
        raise ConfigError(f"eval.metric: {section.metric!r} is not measured here; expected one of {', '.join(names)}")


def unused_evaluation(config: TrainConfig) -> str | None:
    """The first setting of `eval` that requires an evaluation."""
    asked = ("data", "datasets", "every", "metric", "patience")
    return next((name for name in asked if getattr(config.eval, name) not in (None, ())), None)


def check_place(folder: Path) -> Path:
    """The part of the path of save.dir that exists. ConfigError if it is not a folder."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    if not there.is_dir():
        raise ConfigError(f"save.dir: {there} is {kind_of_path(there)}, expected a folder")
    return there


def check_output(folder: Path, needed: int, trial: bool = True) -> None:
    """Check that the run folder is writable and has space for two checkpoints.

    Args:
        folder: save.dir.
        needed: the bytes of a checkpoint.
        trial: create the folder, and write, sync and remove a small folder in it; False writes nothing.

    Raises:
        MachineError: it is not writable, or has not enough space.
    """
    folder = folder.absolute()
    there = check_place(folder)
    check_writable(folder, folder=True)
    free = shutil.disk_usage(there).free + sum(p.stat().st_size for p in folder.glob("checkpoints/step_*/*"))
    if free < 2 * needed:
        raise MachineError(
            f"{folder}: two checkpoints of {in_units(needed)} do not fit into the {in_units(free)} that are free "
            "(save.dir)"
        )
    if trial:
        target = folder / f"trial-{uuid.uuid4().hex[:8]}"
        try:
            with atomic_folder(target) as temporary:
                (temporary / "trial").write_bytes(bytes(4096))
            shutil.rmtree(target)
        except OSError as error:
            raise MachineError(
                f"{folder}: a trial save failed (save.dir): {reason(error)}", error.errno, str(folder)
            ) from error


def check_caches(config: TrainConfig) -> None:
    """Check that the folders of token ids, and of the vectors of a teacher and a guide, can be used.

    A complete cache may be read-only, which is only logged.

    Raises:
        ConfigError: one is a file. MachineError: one does not exist and cannot be created. Both name the setting.
    """
    folders = {"train.token_cache": config.train.token_cache}
    folders |= {f"{name}.cache": section.cache for name, section in config.other_models.items()}
    for key, folder in folders.items():
        if folder is not None:
            _check_cache(key, Path(folder))


def _check_cache(key: str, path: Path) -> None:
    if os.path.lexists(path) and not path.is_dir():
        raise ConfigError(f"{key}: {path} is {kind_of_path(path)}, expected a folder")
    try:
        check_writable(path / "new", folder=True)
    except MachineError as error:
        if not path.is_dir():
            raise MachineError(f"{key}: {error}", error.errno, error.filename) from error
        _log.warning("%s: %s; a text that it does not hold yet stops the run", key, error)


def check_memory(cache: GradCache, stream: PackedBatch, moments: int, device: torch.device) -> None:
    """Check that a step over `stream` fits into memory.

    Args:
        cache: the gradient cache, which plans the step.
        stream: the texts of the step.
        moments: bytes that the optimizer will still allocate.
        device: the device of the model.

    Raises:
        ConfigError: the plan takes more than the free memory, or more than train.memory; the error has the numbers.
    """
    plan = cache.planned(stream)
    assert plan.peak_bytes is not None
    free = free_bytes(device)
    if isinstance(cache.memory, int) and plan.peak_bytes > cache.memory:
        raise ConfigError(
            f"train.memory: the smallest plan of a step takes {in_units(plan.peak_bytes)}, more than the "
            f"{in_units(cache.memory)} given; give more, a smaller train.global_batch_size or model.max_length"
        )
    if plan.peak_bytes + moments > free:
        hint = " or let memory be planned (train.memory = 'auto')" if cache.memory is None else ""
        raise ConfigError(
            f"train.memory: a step takes {in_units(plan.peak_bytes)} and the optimizer {in_units(moments)}, more than "
            f"the {in_units(free)} that "
            f"are free on {device}; choose a smaller train.tokens_per_chunk, train.global_batch_size or "
            "model.max_length, train "
            f"[lora] adapters,{hint} or set activation_checkpointing"
        )


def pending_moments(optimizer: Optimizer) -> int:
    """Bytes of the moments that the first step will allocate; 0 if they exist already."""
    if optimizer.has_state:
        return 0
    return sum(
        moment_bytes(name, parameter, optimizer.config) * local(parameter).numel()
        for name, parameter in optimizer.model.items()
    )


def warn_of_changed_length(config: TrainConfig, step: int, before: int, now: int) -> None:
    """Log the change of the learning rate if a resumed run has another number of steps."""
    if before == now or step >= now:
        return
    old, new = learning_rate(min(step, before - 1), before, config.train), learning_rate(step, now, config.train)
    if abs(old - new) > 1e-6 * config.train.learning_rate:
        _log.warning(
            "the run had %d steps and now has %d: at step %d the learning rate changes from %.3g to %.3g; for a clean "
            "schedule start a new run with model.base = the final model",
            before, now, step + 1, old, new,
        )  # fmt: skip


def warn_of_settings(
    config: TrainConfig, model: Embedder | Reranker, datasets: Datasets, loader: Loader, steps: int
) -> None:
    """Log settings that have less effect than expected in a run of `steps` steps."""
    train, length, positions = config.train, config.model.max_length, model.config.max_position_embeddings
    if train.num_negatives and datasets.most_negatives == 0 and config.stage == 2:
        _log.warning(
            "train.num_negatives is %d, but no row has negatives: in-batch negatives alone (`pyqemb mine` adds hard "
            "ones)",
            train.num_negatives,
        )
    for name, objective in datasets.objectives.items():
        size, negatives = loader.batch_sizes[name], min(train.num_negatives, most_negatives(datasets.examples[name]))
        if not objective(config.loss).can_learn(size, negatives, datasets.examples[name][0]):
            _log.warning(
                "dataset %r: %s has nothing to compare a positive with, its loss is constant: a batch has %d rows, "
                "each with up to %d negatives (train.global_batch_size, train.num_negatives)", name, objective.name,
                size, negatives,
            )  # fmt: skip
    if train.steps is None and steps < _FEW_STEPS:
        _log.warning(
            "the run has only %d step%s: train.global_batch_size is %d, the data have %d rows, train.epochs is %s; a "
            "smaller batch or more epochs give more steps",
            steps, "s" * (steps != 1), train.global_batch_size, sum(map(len, datasets.examples.values())), train.epochs,
        )  # fmt: skip
    if train.warmup >= 1 and 1 < steps <= train.warmup:
        _log.warning("train.warmup is %d steps of a run of %d: the learning rate only rises", int(train.warmup), steps)
    if length is not None and length > positions:
        effect = "pairs are truncated to them" if isinstance(model, Reranker) else "it was not trained on longer texts"
        _log.warning("model.max_length is %d, but the base model has %d positions: %s", length, positions, effect)


def in_units(count: float) -> str:
    """Format bytes with a suitable unit."""
    unit, size = next(((u, n) for u, n in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= n), ("bytes", 1.0))
    return f"{count / size:.2f} {unit}" if size > 1 else f"{count:.0f} {unit}"
