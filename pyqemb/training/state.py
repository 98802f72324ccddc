"""Checkpoints that resume bit for bit: weights, optimizer, random states, position.

Damaged checkpoints are detected and skipped.

A checkpoint is a folder `step_XXXXXXXX`. It holds a model file and an optimizer file (safetensors) for every rank with
a shard of the weights, state.json, and `portable`, the files of the model folder except its weights. It is written
under a temporary name, synced and renamed; manifest.json, written last, has the size and sha256 of every file.
"""

import errno
import logging
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyqemb.data.files import kind_of_path, remove, remove_folder
from pyqemb.data.folder import member
from pyqemb.data.machine import reason, unreadable
from pyqemb.data.sealed import seal, unseal
from pyqemb.data.strict_json import parse
from pyqemb.errors import CheckpointError, ConfigError, DataError, MachineError
from pyqemb.model.checkpoint import sha256, write_safetensors
from pyqemb.model.shard_files import ShardedTensors, Slice, shard_names, slices_metadata
from pyqemb.training.parallel.together import together
from pyqemb.training.parallel.world import World

MANIFEST = "manifest.json"
FORMAT = 3
STATE_FILE = "state.json"
PORTABLE = "portable"
_KINDS = "model", "optimizer"
# Key -> type: configuration, data fingerprint, random states of each rank, best evaluation, skipped steps in a row,
# evaluations in a row without a better value, steps of the whole run.
STATE: dict[str, type | tuple[type, ...]] = {
    "config": dict,
    "data": str,
    "random": list,
    "best": (dict, type(None)),
    "bad_steps": int,
    "evaluations_since_best": int,
    "steps": int,
}
# Optional: `agreement.model_files` of the teacher, of the guide, and of a base model whose weights are not all trained.
_FILES = "base", "teacher", "guide"
_BEST = {"metric": str, "value": (int, float), "step": int}
_MODELS = "final", "best"  # folders of a run
_EXPECTED = "expected 'auto', the folder of a run with checkpoints, or one of its checkpoints (step_...)"
_ALONE = World()
_NAME = re.compile(r"step_(\d{8,})")
_verified: set[Path] = set()  # in this process, because reading a checkpoint of 8B parameters (100 GB) is slow


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint of a step. Tensors are read on access; `state` is JSON with the keys of STATE, maybe of _FILES."""

    folder: Path
    step: int
    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    state: dict[str, Any]
    digest: str = ""  # of its manifest, if it was read

    @classmethod
    def load(cls, folder: Path, rank: int = 0, size: int = 1) -> "Checkpoint":
        """Verify and open one checkpoint; CheckpointError names the missing or damaged file.

        Each of `size` ranks reads a part of the files.
        """
        manifest = _check_files(folder, rank, size)
        path = folder / STATE_FILE
        weights, optimizer = (
            ShardedTensors([folder / name for name in shard_names(kind, manifest["shards"])]) for kind in _KINDS
        )
        try:
            state = parse(path.read_bytes(), str(path))
            digest = sha256(folder / MANIFEST)
        except OSError as error:
            raise unreadable(path, error, CheckpointError) from error
        except ValueError as error:
            raise CheckpointError(f"{folder}: damaged: {error}") from error
        optional = [name for name in _FILES if isinstance(state, dict) and name in state]
        _check_fields(path, state, {**STATE, **dict.fromkeys(optional, dict)})
        for name in optional:
            _check_fields(path, state[name], dict.fromkeys(state[name], str))
        if state["best"] is not None:
            _check_fields(path, state["best"], _BEST)
        return cls(folder, manifest["step"], weights, optimizer, state, digest)


def write_shard(
    folder: Path, number: int, count: int, weights: Mapping[str, Slice], optimizer: Mapping[str, Slice]
) -> dict[str, Any]:
    """Write shard `number`, from 0, of `count` into the folder of a checkpoint, and read it back.

    Tensors that are not sharded are written with the first shard only.

    Returns:
        The size and digest of each file by name, for the manifest.

    Raises:
        MachineError: a file cannot be written, or has other content when it is read back.
    """
    files = {}
    for kind, slices in zip(_KINDS, (weights, optimizer), strict=True):
        own = {name: part for name, part in slices.items() if number == 0 or not part.is_whole}
        path = folder / shard_names(kind, count)[number]
        digest = write_safetensors(path, {name: part.tensor for name, part in own.items()}, slices_metadata(own))
        if sha256(path) != digest:
            raise MachineError(f"{path}: cannot be written: what was read back differs", errno.EIO, str(path))
        files[path.name] = {"size": path.stat().st_size, "sha256": digest}
    return files


def write_manifest(folder: Path, step: int, shards: int, files: Mapping[str, Any]) -> None:
    """Complete the folder of a checkpoint, given the entries of its shards; the other files must exist."""
    others = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    entries = {name: _entry(path) for name, path in others.items() if name not in files}
    manifest = {"format": FORMAT, "step": step, "shards": shards, "files": {**files, **entries}}
    (folder / MANIFEST).write_bytes(seal(manifest))


def verify(folder: Path) -> int:
    """Check every byte of a checkpoint against its manifest; returns its step.

    Raises:
        CheckpointError: a file is missing or damaged, or the format is not supported.
        MachineError: a file cannot be read, so the checkpoint may be intact.
    """
    step: int = _check_files(folder)["step"]
    mark_verified(folder)
    return step


def _check_files(folder: Path, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """`verify` by `size` ranks, each of which reads a part of the files; returns the manifest."""
    path = folder / MANIFEST
    try:
        manifest = _read_manifest(folder, path)
        for number, (name, promised) in enumerate(sorted(manifest["files"].items())):
            file = folder / name
            length = file.stat().st_size
            if length != promised["size"]:
                raise CheckpointError(f"{file}: damaged: expected {promised['size']} bytes, found {length}")
            if number % size == rank and sha256(file) != promised["sha256"]:
                raise CheckpointError(f"{file}: damaged: its checksum is not the one in {MANIFEST}")
    except CheckpointError:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CheckpointError(f"{error.filename}: missing: the checkpoint is not complete") from error
    except OSError as error:
        raise unreadable(error.filename or folder, error, CheckpointError) from error
    except DataError as error:
        raise CheckpointError(str(error)) from error
    return manifest


def mark_verified(folder: Path) -> None:
    """Record that this process need not read the checkpoint again before deleting it."""
    _verified.add(folder.absolute())


def _read_manifest(folder: Path, path: Path) -> dict[str, Any]:
    manifest = unseal(path.read_bytes(), str(path))
    if isinstance(manifest.get("format"), int) and manifest["format"] != FORMAT:
        raise CheckpointError(f"{path}: has format {manifest['format']}, this version reads {FORMAT}")
    _check_fields(path, manifest, {"format": int, "step": int, "shards": int, "files": dict})
    if f"step_{manifest['step']:08}" != folder.name:
        raise CheckpointError(f"{path}: has step {manifest['step']}, which does not match the folder's name")
    files, shards = manifest["files"], min(manifest["shards"], len(manifest["files"]))
    own = {name: entry for name, entry in files.items() if not name.startswith(f"{PORTABLE}/")}
    names = [name for kind in _KINDS for name in shard_names(kind, shards)]
    _check_fields(path, own, dict.fromkeys([*names, STATE_FILE], dict))
    checked_entries(path, files)
    return manifest


def checked_entries(path: Path, files: Any) -> dict[str, Any]:
    """Return `files` if it is the size and digest of each file by name; else CheckpointError, which names `path`."""
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: damaged: expected files by name, found {files!r:.80}")
    for name, entry in files.items():
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise CheckpointError(f"{path}: may name files of its own folder only, got {name!r:.80}")
        member(path.parent, name)  # no link out of it either
        _check_fields(path, entry, {"size": int, "sha256": str})
    return files


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _check_fields(path: Path, values: Any, fields: Mapping[str, Any]) -> None:
    """CheckpointError unless the values have exactly these keys with these types."""
    if not isinstance(values, dict) or values.keys() != fields.keys():
        found = ", ".join(map(str, values)) if isinstance(values, dict) else repr(values)[:80]
        raise CheckpointError(f"{path}: damaged: expected the fields {', '.join(fields)}, found {found}")
    for name, kind in fields.items():
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise CheckpointError(f"{path}: damaged: {name!r} is {values[name]!r:.80}")


def find(run: Path, resume: str | Path | None, warn: Callable[[str], None], world: World = _ALONE) -> Checkpoint | None:
    """The checkpoint to continue from, the same on all ranks; each of them verifies a part of it.

    "auto": the newest intact one of the run folder, None if there was no run. A path: that checkpoint, or the newest
    intact one of that folder. None: no checkpoint.

    Raises:
        ConfigError: the path is not a folder; `run` holds checkpoints or models of a run that would not be continued,
            or a file instead of a folder.
        CheckpointError: there are checkpoints and none is intact, or the path holds none.
        MachineError: a checkpoint cannot be read; it may be intact, so no older one is used instead.
    """
    if resume == "":
        raise ConfigError("resume: expected 'auto' or the path of a checkpoint, got ''")
    candidates: list[Path] = []
    with together(world):
        if world.is_first:
            _check_kinds(run)
            if resume is not None:
                if resume != "auto":
                    _check_folder(Path(resume))
                candidates = _candidates(run / "checkpoints" if resume == "auto" else Path(resume))
    candidates = world.broadcast_object(candidates)
    try:
        if resume is not None and _NAME.fullmatch(Path(resume).name):
            checkpoint: Checkpoint | None = _load_together(candidates[0], world)
        else:
            checkpoint = newest_sound(candidates, warn, world)
    except MachineError as error:
        raise MachineError(f"{error}; nothing was deleted", error.errno, error.filename) from error
    with together(world):
        if world.is_first:
            _check_start(run, resume, checkpoint, warn)
    return checkpoint


def _check_folder(path: Path) -> None:
    """ConfigError if the path to resume from is not a folder."""
    try:
        found = "is a file" if path.is_file() else None if path.exists() else "no such folder"
    except OSError as error:
        raise unreadable(path, error, ConfigError) from error
    if found:
        raise ConfigError(f"resume: {path}: {found}; {_EXPECTED}")


def _check_start(
    run: Path, resume: str | Path | None, checkpoint: Checkpoint | None, warn: Callable[[str], None]
) -> None:
    """Check that a run may start from this checkpoint, or from scratch if it is None."""
    auto = resume == "auto"
    if checkpoint is None and resume is not None and not auto:
        raise CheckpointError(f"{resume}: holds no intact checkpoint; {_EXPECTED}")
    if checkpoint is None and auto and (found := checkpoints(run / "checkpoints")):
        raise CheckpointError(
            f"{run / 'checkpoints'}: none of the {len(found)} checkpoints is intact; the run does not start over: "
            "move the folder away, or choose another save.dir"
        )
    if checkpoint is None and auto and (run / "best").exists() and not (run / "final").exists():
        # Killed between its first evaluation and its first checkpoint: a job that a scheduler restarts must run.
        warn(
            f"{run}: the run that left {run / 'best'} has no checkpoint; it starts from scratch and replaces that model"
        )
    elif checkpoint is None or not (auto or _is_within(Path(resume or ""), run)):
        _check_vacant(run)


def _is_within(path: Path, folder: Path) -> bool:
    """Whether a path is in a folder, by its name or after resolving links."""
    return path.absolute().is_relative_to(folder.absolute()) or path.resolve().is_relative_to(folder.resolve())


def _candidates(path: Path) -> list[Path]:
    """The checkpoint at `path`, or those in it or in its folder `checkpoints`, the newest first."""
    if _NAME.fullmatch(path.name):
        return [path]
    return checkpoints(path / "checkpoints" if (path / "checkpoints").is_dir() else path)[::-1]


def newest_sound(candidates: Sequence[Path], warn: Callable[[str], None], world: World = _ALONE) -> Checkpoint | None:
    """The first intact checkpoint, None if there is none; MachineError if one cannot be read."""
    for path in candidates:
        try:
            return _load_together(path, world)
        except CheckpointError as error:
            warn(f"skipped a checkpoint: {error}")
    return None


def _load_together(path: Path, world: World) -> Checkpoint:
    """A checkpoint that every rank finds intact; the error of one rank is raised on all."""
    checkpoint, failure = None, None
    try:
        checkpoint = Checkpoint.load(path, world.rank, world.size)
    except (CheckpointError, MachineError) as error:
        failure = error
    failures = [error for error in world.gather_object(failure) if error is not None]
    if failures:  # an unreadable checkpoint may be intact, so its error has priority
        raise next((error for error in failures if isinstance(error, MachineError)), failures[0])
    mark_verified(path)
    assert checkpoint is not None
    return checkpoint


def _check_kinds(run: Path) -> None:
    """ConfigError if a folder of the run is a file or a broken link."""
    for path in (*(run / name for name in ("checkpoints", *_MODELS)), *_steps(run / "checkpoints")):
        if os.path.lexists(path) and not path.is_dir():
            raise ConfigError(
                f"{path}: is {kind_of_path(path)}, expected a folder; delete it, or choose another save.dir"
            )


def _check_vacant(run: Path) -> None:
    """ConfigError if an earlier run left checkpoints or models, which a new run would overwrite."""
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
    """The checkpoint folders, oldest first, intact or not."""
    return [path for path in _steps(folder) if path.is_dir()]


def _steps(folder: Path) -> list[Path]:
    """All paths with the name of a checkpoint, oldest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint, by the name of its folder."""
    return int(path.name.removeprefix("step_"))


def remove_leftovers(run: Path) -> None:
    """Delete partial files of a killed process in a run folder. The caller must hold the run's lock."""
    here = (path for pattern in (".*.partial.*", "trial-*", ".shared-*") for path in run.glob(pattern))
    for path in [*here, *(run / "checkpoints").glob(".*.partial.step_*")]:
        with suppress(OSError):
            remove(path)


def random_states() -> dict[str, Any]:
    """The states of the random generators of Python, numpy and torch, as JSON."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],  # type: ignore[union-attr]
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_initialized():  # a run on the CPU must not create a CUDA context on every GPU
        states["cuda"] = [state.numpy().tobytes().hex() for state in torch.cuda.get_rng_state_all()]
    return states


def restore_random_states(states: Mapping[str, Any], where: str | Path) -> None:
    """Restore the result of `random_states`. CheckpointError, which starts with `where`, if it is invalid."""
    try:
        version, numbers, gauss = states["python"]
        random.setstate((version, tuple(numbers), gauss))
        kind, keys, *rest = states["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(_tensor(states["torch"]))
        for device, state in enumerate(states.get("cuda", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(_tensor(state), device)
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{where}: the random states cannot be used: {reason(error)}") from error


def retain(folder: Path, newest: int, keep: int) -> None:
    """Delete all checkpoints except the `keep` newest up to the step just saved, which has been verified.

    Only checkpoints that verify are deleted; one that is damaged or cannot be read stays.
    """
    _delete([path for path in checkpoints(folder) if step_of(path) <= newest][:-keep])


def delete_abandoned(folder: Path, start: int, step: int) -> None:
    """Delete the checkpoints after step `start`, from which the run was resumed, as `retain` does.

    They belong to another branch of the run. This is called just before the checkpoint of `step`, the first one of this
    branch, gets its name, so that a process that is killed in between does not continue on the other branch.
    """
    _delete([path for path in checkpoints(folder) if step_of(path) > start and step_of(path) != step])


def _delete(paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            if path.absolute() not in _verified:
                verify(path)
        except (CheckpointError, MachineError) as error:
            logging.getLogger("pyqemb").warning("an old checkpoint is left in place: %s", error)
            continue
        remove_folder(path)


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
