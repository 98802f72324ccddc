"""Checks that all ranks of a run have the same settings, versions and input files.

Each check is a collective. Its ConfigError is raised on every rank and names the rank, the difference and both values.
"""

import hashlib
import time
import uuid
from pathlib import Path

import torch

from pyqemb import __version__
from pyqemb.data.machine import unreadable, writing
from pyqemb.errors import CheckpointError
from pyqemb.model.source import local_folder
from pyqemb.training.config import TrainConfig
from pyqemb.training.datasets import Datasets
from pyqemb.training.evaluations import Evaluate
from pyqemb.training.parallel.together import together
from pyqemb.training.parallel.world import World
from pyqemb.training.resume import flat
from pyqemb.training.state import Checkpoint

_NETWORK_DELAY = 2.0  # seconds until a new file is visible through a network file system
_MODEL_FILES = "*.json", "*.safetensors", "*/*.json"
_BLOCKS, _BLOCK = 64, 4096  # samples of a file, evenly spaced: two checkpoints of a model differ in nearly all bytes


def check_same_settings(
    world: World, config: TrainConfig, resume: str | Path | None, evaluate: Evaluate | None
) -> None:
    """Check the versions, the configuration, and the arguments of `train` that determine the collectives."""
    world.check_equal(
        {
            "pyqemb": __version__,
            "torch": torch.__version__,
            "resume": None if resume is None else str(resume),
            "evaluate": "given" if evaluate is not None else "not given",
            **flat(config.model_dump(mode="json")),
        }
    )


def check_same_model(world: World, key: str, model: str) -> None:
    """Check the files of the model that a setting names: their names, sizes, and a sample of the bytes."""
    with together(world):
        folder = model_folder(key, model)
        files = model_files(folder) if world.size > 1 else {}
    if world.size > 1:
        world.check_equal({f"{key}: {name}": digest for name, digest in files.items()})


def model_folder(key: str, model: str) -> Path:
    """The folder of the model that a setting names. CheckpointError, which names the setting: there is none."""
    try:
        return local_folder(model)
    except CheckpointError as error:
        raise CheckpointError(f"{key}: {error}") from error


def check_same_data(world: World, datasets: Datasets, fingerprint: str) -> None:
    """Check the training rows; `fingerprint` is that of the datasets."""
    rows = {f"the rows of {name!r}": len(examples) for name, examples in datasets.examples.items()}
    world.check_equal({**rows, "the digest of the data": fingerprint})


def blind_ranks(world: World, folder: Path) -> list[int]:
    """The ranks that do not see the files that rank 0 writes to `folder`, because they have another file system."""
    if world.size == 1:
        return []
    token = folder / f".shared-{world.broadcast_object(uuid.uuid4().hex)}"
    with together(world):
        if world.is_first:
            with writing(folder):
                token.touch()
    end = time.monotonic() + _NETWORK_DELAY
    while not (seen := token.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    blind = [rank for rank, sees in enumerate(world.gather_number(seen)) if not sees]
    with together(world):
        if world.is_first:
            with writing(folder):
                token.unlink(missing_ok=True)
    return blind


def check_same_checkpoint(world: World, checkpoint: Checkpoint | None) -> None:
    """Check the checkpoint to continue from: its step, and the digest of its manifest."""
    found = "none" if checkpoint is None else f"step {checkpoint.step}, digest {checkpoint.digest[:16]}"
    world.check_equal({"the checkpoint": found})


def model_files(folder: Path) -> dict[str, str]:
    """Size and digest of each file of a model; for a large file, the digest of a sample of its bytes.

    Raises:
        MachineError, DataError: a file cannot be read.
    """
    paths = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
    return {path.relative_to(folder).as_posix(): _digest(path) for path in paths}


def other_files(config: TrainConfig) -> dict[str, dict[str, str]]:
    """The `model_files` of the teacher and the guide, by the name of their section.

    Raises:
        CheckpointError: a folder does not exist; the error names the setting.
        MachineError, DataError: a file cannot be read.
    """
    return {
        name: model_files(model_folder(f"{name}.model", section.model)) for name, section in config.other_models.items()
    }


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            last = max(size - _BLOCK, 0)
            digest = hashlib.sha256()
            for place in sorted({last * number // (_BLOCKS - 1) for number in range(_BLOCKS)}):
                file.seek(place)
                digest.update(file.read(_BLOCK))
    except OSError as error:
        raise unreadable(path, error) from error
    return f"{size} bytes, {digest.hexdigest()[:16]}"
