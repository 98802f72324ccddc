"""Builds the parts of a run: the model on its device, the optimizer, the gradient cache, the checkpoint."""

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyqemb.errors import ConfigError
from pyqemb.model.device import pick_device
from pyqemb.model.embedder import Embedder
from pyqemb.model.lora import LoraConfig, add_lora, reset_lora
from pyqemb.model.portable import check_digests
from pyqemb.model.reranker import Reranker
from pyqemb.model.source import local_folder
from pyqemb.training.agreement import blind_ranks, check_same_checkpoint
from pyqemb.training.config import TrainConfig
from pyqemb.training.datasets import Datasets
from pyqemb.training.grad_cache import GradCache
from pyqemb.training.groups import freeze
from pyqemb.training.objectives import LossParameters
from pyqemb.training.optim import Optimizer
from pyqemb.training.parallel.together import together
from pyqemb.training.parallel.world import World
from pyqemb.training.state import Checkpoint, checkpoints, find, remove_leftovers, step_of
from pyqemb.training.teacher import Guide, Teacher, check_dims, first_projection

if TYPE_CHECKING:
    from pyqemb.training.parallel.sharding import Sharding

log = logging.getLogger("pyqemb")


def load_model(config: TrainConfig, device: str | None = None, weights: bool = True) -> Embedder | Reranker:
    """Load the base model in float32 on `device` (None: as configured), with the Matryoshka dimensions of the loss.

    Parameters that are not trained do not require a gradient.

    Without `weights` it is on the meta device, and its folder need not have weights.
    """
    section = config.model
    options: dict[str, Any] = {"attention": section.attention, "max_length": section.max_length}
    if weights:
        options |= {"dtype": torch.float32, "device": device or config.train.device}
    model: Embedder | Reranker
    if config.task == "rerank":
        model = (Reranker.from_pretrained if weights else Reranker.without_weights)(section.base, **options)
    else:
        load = Embedder.from_pretrained if weights else Embedder.without_weights
        model = load(section.base, pooling=section.pooling, **options)
        _set_matryoshka(model, config.loss.matryoshka)
    model.model.checkpointing = config.train.activation_checkpointing
    if config.lora is not None:
        model.requires_grad_(False)
        add_lora(model.model, LoraConfig(**config.lora.model_dump()), seed=config.train.seed)
    if config.train.freeze:
        if config.lora is not None:
            raise ConfigError(
                "train.freeze: with [lora] only adapters are trained, all other weights are frozen; lora.targets "
                "selects the layers with adapters"
            )
        freeze(model, config.train.freeze)
    return model.train()


def load_sharded_model(config: TrainConfig, device: str, world: World) -> tuple[Embedder | Reranker, "Sharding | None"]:
    """`load_model`, and the sharding of its weights (None: every rank holds all of them).

    Each rank reads only its own rows.
    """
    is_sharded = config.parallel.mesh(world.size)[1] > 1
    with together(world):
        model = load_model(config, "meta" if is_sharded else device)
    if not is_sharded:
        return model, None
    from pyqemb.training.parallel.sharding import Sharding, make_mesh  # a slow import

    place = pick_device(device, model.config)
    precision = pick_precision(config.train.precision, place)
    sharding = Sharding(
        model, make_mesh(config.parallel, world, place), precision, world, config.parallel.reshard_after_forward
    )
    model.to_empty(device=place)

    with together(world):
        folder = local_folder(config.model.base)
        if world.is_first:
            check_digests(folder)
        model.load_rows(folder)
    if config.lora is not None:
        reset_lora(model.model, config.train.seed)
    return model, sharding


def _set_matryoshka(model: Embedder, dims: Sequence[int] | None) -> None:
    if dims is not None:
        if max(dims) > (size := model.config.hidden_size):
            raise ConfigError(f"loss.matryoshka: the model has {size} dimensions, got {max(dims)}")
        model.matryoshka = tuple(sorted(dims, reverse=True))


def build_teacher(config: TrainConfig, model: Embedder | Reranker) -> tuple[Teacher | None, torch.Tensor | None]:
    """The teacher on the device of the model, and the projection [F, E] before the first step, if configured."""
    section = config.teacher
    if section is None:
        return None, None
    teacher = Teacher(section, vectors_folder(config, "teacher"), model.device)
    size = model.config.hidden_size
    check_dims(section, teacher.dim, size)
    if not section.projection:
        teacher.used = size
    return teacher, first_projection(teacher.dim, size, config.train.seed) if section.projection else None


def build_guide(config: TrainConfig, model: Embedder | Reranker, datasets: Datasets) -> Guide | None:
    """The guide on the device of the model, if configured. ConfigError if no dataset uses it."""
    check_guided(config, datasets)
    return None if config.guide is None else Guide(config.guide, vectors_folder(config, "guide"), model.device)


def vectors_folder(config: TrainConfig, key: str) -> Path:
    """The folder of the vectors of the teacher or the guide."""
    cache = config.other_models[key].cache
    return Path(config.save.dir) / key / "vectors" if cache is None else Path(cache)


def check_guided(config: TrainConfig, datasets: Datasets) -> None:
    """ConfigError if there is a guide that no dataset uses."""
    if config.guide is not None and not any(objective.guided for objective in datasets.objectives.values()):
        used = sorted({objective.name for objective in datasets.objectives.values()})
        raise ConfigError(f"guide: no dataset is trained by info_nce, which uses it; they are by {', '.join(used)}")


def build_optimizer(
    config: TrainConfig, model: Embedder | Reranker, parameters: LossParameters, sharding: "Sharding | None" = None
) -> Optimizer:
    """Return the optimizer of the model's weights in float32 and of the parameters of the loss.

    The model then computes in `train.precision`; for a sharded model, FSDP rounds the weights when it gathers them.
    """
    precision = torch.float32 if sharding else pick_precision(config.train.precision, model.device)
    extra_parameters = {f"loss.{name}": p for name, p in parameters.named_parameters()}
    return Optimizer(model, config.train, precision, extra_parameters)


def build_cache(
    config: TrainConfig, model: Embedder | Reranker, optimizer: Optimizer, sharding: "Sharding | None" = None
) -> GradCache:
    """The gradient cache, which adds gradients to the optimizer's weights."""
    train = config.train
    return GradCache(
        model, None, train.tokens_per_chunk, memory=train.memory, skip=train.skip_gradients,
        parameters=optimizer.weights.values(), ranks=sharding,
    )  # fmt: skip


def find_checkpoint(folder: Path, resume: str | Path | None, world: World, shards: int = 1) -> Checkpoint | None:
    """The checkpoint that a run in `folder` continues from, the same on all ranks; see `state.find`.

    Ranks that do not see the folder of rank 0 receive its checkpoint.

    Raises:
        ConfigError: the ranks find different checkpoints; a rank that does not see the folder of rank 0 has a newer
            checkpoint in its own folder; or there is such a rank and the weights are sharded (`shards`).
    """
    with together(world):  # the other ranks search for checkpoints after the cleanup
        if world.is_first:
            remove_leftovers(folder)
    blind = blind_ranks(world, folder)
    if blind and shards > 1:
        raise ConfigError(
            f"save.dir: rank {blind[0]} does not see the folder of rank 0, {folder.absolute()}: ranks that share the "
            "weights write their checkpoints into one folder, on a file system that all of them see"
        )
    checkpoint = _find_blind(folder, resume, world, blind) if blind else find(folder, resume, log.warning, world)
    check_same_checkpoint(world, checkpoint)
    return checkpoint


def _find_blind(folder: Path, resume: str | Path | None, world: World, blind: list[int]) -> Checkpoint | None:
    """The checkpoint of rank 0, on all ranks, if some do not see its folder."""
    log.warning(
        "save.dir: rank %s does not see the folder of rank 0, %s: checkpoints and models are on its machine only",
        ", ".join(map(str, blind)), folder.absolute(),
    )  # fmt: skip
    with together(world):
        checkpoint = find(folder, resume, log.warning) if world.is_first else None
    newest = world.gather_number(max((step_of(path) for path in checkpoints(folder / "checkpoints")), default=-1))
    if resume is not None and max(newest) > newest[0]:
        raise ConfigError(
            f"save.dir: rank {newest.index(max(newest))} has a checkpoint of step {max(newest)}, rank 0 has "
            f"{f'one of step {newest[0]}' if newest[0] >= 0 else 'none'}, and they do not share {folder}: rank 0 "
            "has to run on the machine with the newest checkpoint"
        )
    return _received(world, checkpoint)


def _received(world: World, checkpoint: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint of rank 0, on all ranks."""
    head = world.broadcast_object(None if checkpoint is None else replace(checkpoint, weights={}, optimizer={}))
    if head is None:
        return None
    own = checkpoint or head
    return replace(head, weights=world.broadcast_tensors(own.weights), optimizer=world.broadcast_tensors(own.optimizer))


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `train.precision` on a device."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch. The loader has its own generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
