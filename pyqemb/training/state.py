"""Checkpoints that continue bit by bit: weights, optimizer, random states, position.

Damaged ones are found and skipped.

A checkpoint is a folder `step_XXXXXXXX` of safetensors and JSON. It is written beside its place, synced and renamed;
its manifest.json, written last, names every file's size and sha256.
"""

import json
import logging
import os
import random
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pyqemb.data.files import atomic_folder, kind_of_path, remove, remove_folder
from pyqemb.data.machine import reason, unreadable
from pyqemb.data.sealed import seal, unseal
from pyqemb.data.strict_json import parse
from pyqemb.errors import CheckpointError, ConfigError, DataError, MachineError
from pyqemb.model.checkpoint import sha256, write_safetensors

MANIFEST = "manifest.json"
FORMAT = 2
_FILES = "model.safetensors", "optimizer.safetensors", "state.json"
# Key -> type: configuration, data fingerprint, random states, best evaluation, skipped steps in a row, evaluations in a
# row without a better value, steps of the whole run.
STATE: dict[str, type | tuple[type, ...]] = {
    "config": dict,
    "data": str,
    "random": dict,
    "best": (dict, type(None)),
    "bad_steps": int,
    "evaluations_since_best": int,
    "steps": int,
}
_BEST = {"metric": str, "value": (int, float), "step": int}
_MODELS = "final", "best"  # folders of a run
_NAME = re.compile(r"step_(\d{8,})")
_verified: set[Path] = set()  # by this process: a checkpoint of 8B parameters is 100 GB to read


@dataclass(frozen=True)
class Checkpoint:
    """What a step left behind. `state` is JSON with the keys of STATE."""

    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]
    digest: str = ""  # of its manifest, where it was read

    def save(self, folder: Path, keep: int) -> Path:
        """Write the checkpoint as `folder/step_XXXXXXXX`; then delete all but the `keep` newest.

        Older ones are deleted only once the new one has been verified.

        A checkpoint is only deleted when it verifies: one that is damaged or cannot be read is left where it is.
        Raises MachineError, with every older checkpoint intact, where it cannot be written.
        """
        target = folder / f"step_{self.step:08}"
        try:
            with atomic_folder(target) as temporary:
                write_safetensors(temporary / _FILES[0], self.weights)
                write_safetensors(temporary / _FILES[1], self.optimizer)
                (temporary / _FILES[2]).write_text(json.dumps(self.state), encoding="utf-8")
                (temporary / MANIFEST).write_bytes(_manifest(temporary, self.step))
        except MachineError as error:
            words = f"{target}: could not be written: {reason(error)}; older checkpoints are intact"
            raise MachineError(words, error.errno, str(target)) from error
        verify(target)
        _retain(folder, self.step, keep)
        return target

    @classmethod
    def load(cls, folder: Path) -> "Checkpoint":
        """Verify and read one checkpoint; CheckpointError names the file that is missing or damaged."""
        step = verify(folder)
        try:
            weights, optimizer = (load_file(folder / name) for name in _FILES[:2])
            state = parse((folder / _FILES[2]).read_bytes(), str(folder / _FILES[2]))
            digest = sha256(folder / MANIFEST)
        except OSError as error:
            raise unreadable(error.filename or folder, error, CheckpointError) from error
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"{folder}: damaged: {error}") from error
        _check_fields(folder / _FILES[2], state, STATE)
        if state["best"] is not None:
            _check_fields(folder / _FILES[2], state["best"], _BEST)
        return cls(step, weights, optimizer, state, digest)


def verify(folder: Path) -> int:
    """Check every byte of a checkpoint against its manifest; returns its step.

    Raises:
        CheckpointError: a file is missing or damaged, or the format is another one.
        MachineError: a file cannot be read, which says nothing about what it holds.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        manifest = unseal(raw, str(path))
        _check_fields(path, manifest, {"format": int, "step": int, "files": dict})
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path}: is of format {manifest['format']}, this version reads {FORMAT}")
        if f"step_{manifest['step']:08}" != folder.name:
            raise CheckpointError(f"{path}: is of step {manifest['step']}, which is not the folder's name")
        _check_fields(path, manifest["files"], dict.fromkeys(_FILES, dict))
        for name, promised in manifest["files"].items():
            _check_fields(path, promised, {"size": int, "sha256": str})
            file = folder / name
            size = file.stat().st_size
            if size != promised["size"]:
                raise CheckpointError(f"{file}: damaged: expected {promised['size']} bytes, found {size}")
            if sha256(file) != promised["sha256"]:
                raise CheckpointError(f"{file}: damaged: its checksum is not the one in {MANIFEST}")
    except CheckpointError:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CheckpointError(f"{error.filename}: missing: the checkpoint is not complete") from error
    except OSError as error:
        raise unreadable(error.filename or folder, error, CheckpointError) from error
    except DataError as error:
        raise CheckpointError(str(error)) from error
    _verified.add(folder.absolute())
    return manifest["step"]


def _check_fields(path: Path, values: Any, fields: Mapping[str, Any]) -> None:
    """Exactly these keys, of these types."""
    if not isinstance(values, dict) or values.keys() != fields.keys():
        found = ", ".join(map(str, values)) if isinstance(values, dict) else repr(values)[:80]
        raise CheckpointError(f"{path}: damaged: expected the fields {', '.join(fields)}, found {found}")
    for name, kind in fields.items():
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise CheckpointError(f"{path}: damaged: {name!r} is {values[name]!r:.80}")


def find(run: Path, resume: str | Path | None, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to continue from.

    "auto": the newest sound one of the run folder, None where there was no run. A path: that checkpoint, or the newest
    sound one of that folder. None: no checkpoint.

    Raises:
        ConfigError: `run` holds checkpoints or models of a run that would not be continued, or a file where a folder
            has to be.
        CheckpointError: there are checkpoints and none is sound, or the path holds none.
        MachineError: one cannot be read; it may be sound, so no older one is taken in its place.
    """
    if resume == "":
        raise ConfigError("resume: expected 'auto' or the path of a checkpoint, got ''")
    _check_kinds(run)
    if resume is None:
        _check_vacant(run)
        return None
    auto = resume == "auto"
    try:
        checkpoint = _newest(run / "checkpoints" if auto else Path(resume), warn)
    except MachineError as error:
        raise MachineError(f"{error}; nothing was deleted", error.errno, error.filename) from error
    if checkpoint is None and not auto:
        raise CheckpointError(f"{resume}: holds no sound checkpoint")
    if checkpoint is None and (found := checkpoints(run / "checkpoints")):
        raise CheckpointError(
            f"{run / 'checkpoints'}: none of the {len(found)} checkpoints is sound; the run does not start anew over "
            "them: move the folder away, or choose another save.dir"
        )
    if checkpoint is None and auto and (run / "best").exists() and not (run / "final").exists():
        # Killed between its first evaluation and its first checkpoint: a job that a scheduler starts again must go on.
        warn(f"{run}: the run that left {run / 'best'} has no checkpoint; it starts anew and replaces that model")
    elif checkpoint is None or not (auto or _is_within(Path(resume), run)):
        _check_vacant(run)
    return checkpoint


def _is_within(path: Path, folder: Path) -> bool:
    """By its name or, where links lead elsewhere, by its place."""
    return path.absolute().is_relative_to(folder.absolute()) or path.resolve().is_relative_to(folder.resolve())


def _newest(path: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the checkpoint at `path`, or the newest sound one in it or in its folder `checkpoints`.

    None where none is sound.
    """
    if _NAME.fullmatch(path.name):
        return Checkpoint.load(path)
    for each in reversed(checkpoints(path / "checkpoints" if (path / "checkpoints").is_dir() else path)):
        try:
            return Checkpoint.load(each)
        except CheckpointError as error:
            warn(f"passed over a checkpoint: {error}")
    return None


def _check_kinds(run: Path) -> None:
    """ConfigError where a folder of the run is a file, or a link that leads nowhere."""
    for path in (*(run / name for name in ("checkpoints", *_MODELS)), *_steps(run / "checkpoints")):
        if os.path.lexists(path) and not path.is_dir():
            raise ConfigError(
                f"{path}: is {kind_of_path(path)}, expected a folder; delete it, or choose another save.dir"
            )


def _check_vacant(run: Path) -> None:
    """ConfigError where an earlier run left checkpoints or models: a new one would write over them."""
    if existing := checkpoints(run / "checkpoints"):
        raise ConfigError(
            f"{existing[-1]}: an earlier run left checkpoints here; continue it with --resume auto "
            "(resume='auto'), or choose another save.dir"
        )
    for path in (run / name for name in _MODELS):
        if path.exists():
            raise ConfigError(
                f"{path}: an earlier run left its model here and no checkpoint to continue from; choose another "
                "save.dir, or "
                f"delete {path}"
            )


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders, oldest first, sound or not."""
    return [path for path in _steps(folder) if path.is_dir()]


def _steps(folder: Path) -> list[Path]:
    """All that has the name of a checkpoint, oldest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint, by the name of its folder."""
    return int(path.name.removeprefix("step_"))


def remove_leftovers(run: Path) -> None:
    """Delete what a killed process left half-written in a run folder. Only for the holder of the run's lock."""
    for path in [*run.glob(".*.partial.*"), *(run / "checkpoints").glob(".*.partial.step_*"), *run.glob("trial-*")]:
        with suppress(OSError):
            remove(path)


def random_states() -> dict[str, Any]:
    """The generators of python, numpy and torch as JSON."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],  # type: ignore[union-attr]
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_initialized():  # a run on the CPU must not open a context on every GPU
        states["cuda"] = [state.numpy().tobytes().hex() for state in torch.cuda.get_rng_state_all()]
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Put back what `random_states` returned. CheckpointError where it is none of that."""
    try:
        version, numbers, gauss = states["python"]
        random.setstate((version, tuple(numbers), gauss))
        kind, keys, *rest = states["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(_tensor(states["torch"]))
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint's random states cannot be used: {error}") from error
    for device, state in enumerate(states.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_tensor(state), device)


def _retain(folder: Path, newest: int, keep: int) -> None:
    """Later steps than the one just saved are of an abandoned branch (it was resumed from before them)."""
    stale = [path for path in checkpoints(folder) if step_of(path) > newest]
    current = [path for path in checkpoints(folder) if path not in stale]
    for path in [*stale, *current[:-keep]]:
        try:
            if path.absolute() not in _verified:
                verify(path)
        except (CheckpointError, MachineError) as error:
            logging.getLogger("pyqemb").warning("an old checkpoint is left in place: %s", error)
            continue
        remove_folder(path)


def _manifest(folder: Path, step: int) -> bytes:
    files = {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in _FILES}
    return seal({"format": FORMAT, "step": step, "files": files})


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
