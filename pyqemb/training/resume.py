"""Checks whether a run with a given configuration can continue from a checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch

from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.model.shard_files import shape_of
from pyqemb.training.config import DataSet, TrainConfig
from pyqemb.training.state import Checkpoint

# Settings that a resumed run may change.
_FREE = {
    "parallel",
    "eval",
    "save",
    "log",
    "train.log_every",
    "train.tensorboard",
    "train.max_bad_steps",
    "train.token_cache",
    "teacher.cache",
    "guide.cache",
    "train.rank_timeout",
}
_LENGTH = {"train.steps", "train.epochs"}  # may change too, unless the sampling weights depend on it


def check_continues(
    checkpoint: Checkpoint,
    config: TrainConfig,
    fingerprint: str,
    weights: Mapping[str, torch.Tensor],
    base_files: Mapping[str, str] | None = None,
    other_files: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Raise an error if the checkpoint belongs to another run.

    Args:
        checkpoint: the checkpoint to continue from.
        config: the configuration of the resumed run.
        fingerprint: the digest of the training data.
        weights: the tensors that are trained, by name.
        base_files: `model_files` of the base model, if the run does not train all of its weights (default: not
            checked).
        other_files: `model_files` of the teacher and the guide, by section (default: not checked).

    Raises:
        ConfigError: the configuration, the base model, a teacher, a guide or the data differ.
        CheckpointError: the tensors differ.
    """
    free = _FREE | (set() if any(entry.max_epochs for entry in config.data) else _LENGTH)
    changed = differences(_with_new_keys(checkpoint.state["config"]), config.model_dump(mode="json"), free)
    if changed:
        raise ConfigError(f"cannot resume with another configuration: {'; '.join(changed)}")
    if base_files is not None and (changed := changed_files(checkpoint, base_files)):
        raise ConfigError(f"cannot resume: the base model {config.model.base} has changed: {'; '.join(changed)}")
    for name, files in (other_files or {}).items():
        if changed := _changed(checkpoint.state.get(name, {}), files):
            model = config.other_models[name].model
            raise ConfigError(f"cannot resume: {name}.model {model} has changed: {'; '.join(changed)}")
    if checkpoint.state["data"] != fingerprint:
        raise ConfigError("cannot resume: the training data are not those of the checkpoint")
    shapes = {name: shape_of(checkpoint.weights, name) for name in checkpoint.weights}
    if shapes != {name: tuple(weight.shape) for name, weight in weights.items()}:
        raise CheckpointError(f"step {checkpoint.step}: its tensors do not match those of {config.model.base}")


def _with_new_keys(before: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a checkpoint, with the defaults of the keys that are newer than it."""
    filled = dict(before)
    for name, field in TrainConfig.model_fields.items():
        if field.default_factory is not None:
            defaults: Any = field.get_default(call_default_factory=True)
            filled[name] = {**defaults.model_dump(mode="json"), **before.get(name, {})}
        elif name not in filled and not field.is_required():  # a section that is absent by default
            filled[name] = field.default
    of_data = DataSet(path="").model_dump(mode="json")
    filled["data"] = [{**of_data, **entry} for entry in before.get("data", [])]
    return filled


def changed_files(checkpoint: Checkpoint, base_files: Mapping[str, str]) -> list[str]:
    """The files of the base model that differ from those with which a run that keeps some of its weights began.

    Files that were added are not counted: another library may download more files to the same folder of the hub's
    cache. Checkpoints of earlier versions do not list the files.
    """
    return _changed(checkpoint.state.get("base", {}), base_files)


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [
        f"{name} was {digest}, now {now.get(name, 'missing')}"
        for name, digest in before.items()
        if now.get(name) != digest
    ]


def differences(before: Any, now: Any, free: set[str], path: str = "") -> list[str]:
    """The differences of two configurations, apart from the keys in `free`."""
    if path in free:
        return []
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = (dict(enumerate(values)) for values in (before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [x for k in keys for x in differences(before.get(k), now.get(k), free, f"{path}.{k}".lstrip("."))]
    return [] if before == now else [f"{path} was {before!r}, now {now!r}"]


def flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Every setting by its dotted name."""
    settings: dict[str, Any] = {}
    for key, value in values.items():
        settings |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return settings
