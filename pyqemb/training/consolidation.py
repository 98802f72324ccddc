"""Export of a training checkpoint, sharded or not, as a portable folder, tensor by tensor in one process."""

import logging
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import torch

from pyqemb.data.arguments import NotNegative, checked
from pyqemb.data.files import locked
from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.model.checkpoint import LM_HEAD, Tensors, check_weights
from pyqemb.model.embedder import Embedder
from pyqemb.model.families import FAMILIES, read_config
from pyqemb.model.lora import LoraConfig, add_lora
from pyqemb.model.packed_model import Read, errors_of
from pyqemb.model.reranker import Reranker
from pyqemb.model.sentence import read_contract
from pyqemb.model.shard_files import shape_of
from pyqemb.model.source import local_folder, named_dtype
from pyqemb.training.agreement import model_files
from pyqemb.training.config import TrainConfig
from pyqemb.training.optim import AVERAGE
from pyqemb.training.resume import changed_files
from pyqemb.training.state import PORTABLE, STATE_FILE, Checkpoint, checkpoints, newest_sound

_log = logging.getLogger("pyqemb")
_TRIES = 5


@checked
def consolidate(run: str | Path, step: NotNegative | None = None, out: str | Path | None = None) -> Path:
    """Write the model of a run's checkpoint as the folder that the run would write at its end.

    Memory holds about one tensor. Adapters are merged into the weights. Partial output of a killed process is removed,
    and the folder is written again.

    Args:
        run: the folder of a run, `save.dir`. The run may still be training if `out` is outside of it.
        step: the step of the checkpoint (default: the newest intact one).
        out: the folder to write (default: `final` in the folder of the run).

    Returns:
        The folder.

    Raises:
        ConfigError: `out` exists, or the run is in progress and `out` is in its folder.
        CheckpointError: the checkpoint is missing or damaged, or, for a run that does not train all weights, the base
            model is missing or has changed.
        MachineError: the folder cannot be written.

    Example:
        >>> from pyqemb.testing.tiny import write_tiny_folder
        >>> rows = [{"query": f"question {i}", "positive": f"answer {i}"} for i in range(8)]
        >>> settings = {"steps": 2, "global_batch_size": 4, "device": "cpu"}
        >>> config = pyqemb.stage1(
        ...     model={"base": str(write_tiny_folder("base"))}, data=rows, train=settings, save={"dir": "run"}
        ... )
        >>> _ = pyqemb.train(config)
        >>> pyqemb.consolidate("run", out="model")
        PosixPath('model')
    """
    run = Path(run)
    target = run / "final" if out is None else Path(out)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: exists already; choose another folder with --out, or delete it")
    if not checkpoints(run / "checkpoints"):
        raise CheckpointError(f"{run}: holds no checkpoint of a training run")
    inside = target.absolute().is_relative_to(run.absolute())
    with locked(run, "process") if inside else nullcontext():
        checkpoint = _checkpoint(run / "checkpoints", step)
        portable = checkpoint.folder / PORTABLE
        dtype, config = _dtype(portable), _config(checkpoint)
        model, read = _model(checkpoint, config, portable)
        _check_shapes(checkpoint, model, not config.keeps_base)
        provenance = read_contract(portable).get("provenance")
        return model.save_parameters(lambda name: read(name).float().to(dtype), target, dtype, provenance)


def _dtype(portable: Path) -> torch.dtype:
    """The dtype of the weights that the run would write."""
    with errors_of(portable / "config.json"):
        dtype = named_dtype(read_config(portable).extra.get("dtype"))
    if dtype is None:
        raise CheckpointError(f"{portable / 'config.json'}: has no dtype")
    return dtype


def _config(checkpoint: Checkpoint) -> TrainConfig:
    """The configuration of the run without its data, which may have been rows in memory."""
    with errors_of(checkpoint.folder / STATE_FILE):
        return TrainConfig(**{name: section for name, section in checkpoint.state["config"].items() if name != "data"})


def _check_shapes(checkpoint: Checkpoint, model: Embedder | Reranker, is_whole: bool) -> None:
    """CheckpointError unless the checkpoint has the parameters of its model; not those that are not trained."""
    for name, parameter in model.named_parameters():
        if name not in checkpoint.weights:
            if is_whole:
                raise CheckpointError(f"{checkpoint.folder}: has no {name}, which its config.json asks for")
        elif (shape := shape_of(checkpoint.weights, name)) != tuple(parameter.shape):
            raise CheckpointError(
                f"{checkpoint.folder}: {name} has shape {list(shape)}, its config.json asks for {list(parameter.shape)}"
            )


def _checkpoint(folder: Path, step: int | None) -> Checkpoint:
    if step is not None:
        path = folder / f"step_{step:08}"
        if not path.is_dir():
            found = ", ".join(str(int(each.name.removeprefix("step_"))) for each in checkpoints(folder))
            raise CheckpointError(f"{path}: no such checkpoint; the run has checkpoints of steps {found}")
        return Checkpoint.load(path)
    for _ in range(_TRIES):  # a run that is training may delete checkpoints while they are verified
        before = checkpoints(folder)
        checkpoint = newest_sound(before[::-1], _log.warning)
        if checkpoint is not None:
            return checkpoint
        if checkpoints(folder) == before:
            raise CheckpointError(f"{folder}: holds no intact checkpoint")
    raise CheckpointError(f"{folder}: the run deletes its checkpoints before they are read; increase save.keep")


class _Base:
    """The weights of the base model, opened on access; a run that trains all weights does not need them."""

    def __init__(self, folder: str, kind: type[Embedder | Reranker]):
        self.folder, self.kind = folder, kind

    @cached_property
    def tensors(self) -> Tensors:
        """The tensors of its folder."""
        folder = local_folder(self.folder)
        return Tensors(folder, self.kind.heads, family=FAMILIES[read_config(folder).model_type])

    @cached_property
    def lm_head(self) -> torch.Tensor:
        """The untied language-model head of the base model."""
        head = self.tensors.head(LM_HEAD)
        if head is None:
            raise CheckpointError(f"{self.folder}: {LM_HEAD} is missing, which the trained reranker had")
        return head


def _model(checkpoint: Checkpoint, config: TrainConfig, portable: Path) -> tuple[Embedder | Reranker, Read]:
    """The model on the meta device, and a function that reads its parameters from the checkpoint or the base model."""
    base = _Base(config.model.base, Reranker if config.task == "rerank" else Embedder)
    if config.task == "rerank":
        tied = read_config(portable).tie_word_embeddings
        model: Embedder | Reranker = Reranker.without_weights(portable, lm_head=None if tied else base.lm_head)
    else:
        model = Embedder.without_weights(portable)
    names: dict[str, str] = {}
    if config.keeps_base:
        if changed := changed_files(checkpoint, model_files(local_folder(config.model.base))):
            raise CheckpointError(f"{config.model.base}: the base model has changed: {'; '.join(changed)}")
        if config.lora is not None:
            add_lora(model.model, LoraConfig(**config.lora.model_dump()))
        names = check_weights(model.model, base.tensors)

    def read(name: str) -> torch.Tensor:
        if config.uses_average(config.save) and f"{name}/{AVERAGE}" in checkpoint.optimizer:
            return checkpoint.optimizer[f"{name}/{AVERAGE}"]
        if name in checkpoint.weights:
            return checkpoint.weights[name]
        if name == "head" and isinstance(model, Reranker):
            return base.lm_head[[model.tokenizer.yes_id, model.tokenizer.no_id]]
        return base.tensors[names[name.removeprefix("model.")]]

    return model, read
