"""Checkpoints that continue bit by bit: weights, optimiser, random states, position; damaged ones are found and passed over.

A checkpoint is a folder `step_XXXXXXXX` of safetensors and JSON. It is written beside its place, synced and renamed; its
manifest.json, written last, names every file's size and sha256.
"""

import fcntl
import hashlib
import json
import os
import platform
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pyqemb.data.files import atomic_folder
from pyqemb.data.machine import reason
from pyqemb.errors import CheckpointError, ConfigError, MachineError
from pyqemb.model.checkpoint import sha256, write_safetensors

MANIFEST = "manifest.json"
_FILES = "model.safetensors", "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """What a step left behind. `state` is JSON: config, data fingerprint, random states, best metric, bad steps."""

    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]

    def save(self, folder: Path, keep: int) -> Path:
        """Write it as `folder/step_XXXXXXXX`; then delete all but the `keep` newest, once the new one has been verified.

        MachineError, with every older checkpoint intact, where it cannot be written.
        """
        target = folder / f"step_{self.step:08}"
        try:
            with atomic_folder(target) as temporary:
                write_safetensors(temporary / _FILES[0], self.weights)
                write_safetensors(temporary / _FILES[1], self.optimizer)
                (temporary / _FILES[2]).write_bytes(_canonical(self.state))
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
            return cls(step, weights, optimizer, json.loads((folder / _FILES[2]).read_bytes()))
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{folder}: cannot be read: {error}") from error


def verify(folder: Path) -> int:
    """Check every byte of a checkpoint against its manifest; returns its step."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw)
        files, step, digest = manifest["files"], manifest["step"], manifest.pop("sha256")
        whole = digest == hashlib.sha256(_canonical(manifest)).hexdigest()
        # Byte for byte: a flipped bit that JSON forgives is a flipped bit all the same.
        whole = whole and raw == _canonical({**manifest, "sha256": digest}) and set(files) == set(_FILES)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing: the checkpoint is not complete") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged: {error!r}") from error
    if not whole:
        raise CheckpointError(f"{path}: damaged: it does not match its own checksum")
    for name, promised in files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != promised["size"]:
            raise CheckpointError(f"{file}: damaged: expected {promised['size']} bytes, found {size}")
        if sha256(file) != promised["sha256"]:
            raise CheckpointError(f"{file}: damaged: its checksum is not the one in {MANIFEST}")
    return step


def find(folder: Path, resume: str | Path | None, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to continue from.

    "auto": the newest sound one under `folder`, None if there is none. A path: that checkpoint, or the newest sound one of
    that folder; CheckpointError if there is none. None: no checkpoint, and ConfigError where `folder` already has some.
    """
    if resume is None:
        if existing := checkpoints(folder):
            raise ConfigError(
                f"{existing[-1]}: an earlier run left checkpoints here; continue it with --resume auto "
                "(resume='auto'), or choose another save.dir"
            )
        return None
    if resume != "auto":
        path = Path(resume)
        if _NAME.fullmatch(path.name):
            return Checkpoint.load(path)
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for path in reversed(checkpoints(folder)):
        try:
            return Checkpoint.load(path)
        except CheckpointError as error:
            warn(f"passed over a checkpoint: {error}")
    if resume != "auto":
        raise CheckpointError(f"{resume}: holds no sound checkpoint")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders, oldest first, sound or not."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half-written. Only for the holder of the run's lock."""
    for path in folder.glob(".*.partial.step_*"):
        shutil.rmtree(path, ignore_errors=True)


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
    """Put back what `random_states` returned."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_tensor(states["torch"]))
    for device, state in enumerate(states.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_tensor(state), device)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder; ConfigError names the process that already does. A killed holder lets go by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigError(f"{folder}: another training run is at work here: {file.read().strip()}") from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def _retain(folder: Path, newest: int, keep: int) -> None:
    """Later steps than the one just saved are of an abandoned branch (it was resumed from before them)."""
    stale = [path for path in checkpoints(folder) if int(path.name.removeprefix("step_")) > newest]
    current = [path for path in checkpoints(folder) if path not in stale]
    for path in [*stale, *current[:-keep]]:
        doomed = path.with_name(f".{os.getpid()}.partial.{path.name}")
        os.rename(path, doomed)  # so that a half-deleted checkpoint never bears a checkpoint's name
        shutil.rmtree(doomed)


def _manifest(folder: Path, step: int) -> bytes:
    files = {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in _FILES}
    manifest = {"format": 1, "step": step, "files": files}
    return _canonical({**manifest, "sha256": hashlib.sha256(_canonical(manifest)).hexdigest()})


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
