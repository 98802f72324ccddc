"""Which parameters are trained, and the learning rate of each: freezing by pattern, layer-wise decay, own rates."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any, NamedTuple

from torch import nn

from pyqemb.errors import ConfigError, did_you_mean
from pyqemb.model.checkpoint import LM_HEAD
from pyqemb.model.packed_model import PackedModel
from pyqemb.training.config import TrainSection

_LAYER = re.compile(r"\blayers\.(\d+)\.")


class Group(NamedTuple):
    """Parameters with the same optimizer, learning rate and weight decay; the rate is `scale` times the schedule's."""

    optimizer: str
    scale: float
    weight_decay: float
    names: list[str]


def freeze(model: PackedModel, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names match one of the patterns of `train.freeze`.

    A pattern is a glob of names in the model folder, or of modules, e.g. `layers.0`. The prefix `model.` of causal
    language models is optional.

    Raises:
        ConfigError: a pattern matches nothing, or no parameter is left to train.
    """
    parameters = {_stored_name(model, name): parameter for name, parameter in model.named_parameters()}
    for pattern in patterns:
        wanted = pattern.removeprefix("model.")
        matching = [name for name in parameters if any(fnmatchcase(name, glob) for glob in (wanted, f"{wanted}.*"))]
        if not matching:
            modules = {name.rsplit(".", up)[0] for name in parameters for up in range(name.count(".") + 1)}
            raise ConfigError(
                f"train.freeze: {pattern!r} matches no parameter of the model{did_you_mean(wanted, sorted(modules))}; "
                f"its parameters are called like {', '.join(_examples(parameters))}"
            )
        for name in matching:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(f"train.freeze: {', '.join(patterns)} freezes every parameter; nothing is left to train")


def _stored_name(model: PackedModel, name: str) -> str:
    """The name of a parameter in the folder of a model, without the prefix `model.`."""
    return LM_HEAD if name == "head" else model.model.family.stored_name(name.removeprefix("model."))


def _examples(names: Iterable[str]) -> Iterator[str]:
    """One name of each part: the embeddings, a layer, the rest."""
    seen = set()
    for name in names:
        kind = name.split(".")[0]
        if kind not in seen:
            seen.add(kind)
            yield name


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to: "embeddings", "layer N", "head" or "rest"."""
    if match := _LAYER.search(name):
        return f"layer {match[1]}"
    return "embeddings" if "embed_tokens." in name else "head" if name == "head" else "rest"


def rate_scales(names: Iterable[str], config: TrainSection) -> dict[str, float]:
    """The learning rate of each part of the model, as a factor of `train.learning_rate`.

    With `layer_decay` d and L layers, layer i (from 0) has the factor d^(L - i), the embeddings have d^(L + 1), the
    head and the final norm 1. `embedding_learning_rate` and `head_learning_rate` replace the factor of their part.

    Args:
        names: the names of all parameters, frozen ones too: they determine L.
        config: the section `train`.
    """
    parts = list(dict.fromkeys(part_of(name) for name in names))
    layers = [int(part.split()[1]) for part in parts if part.startswith("layer ")]
    top = max(layers, default=-1) + 2
    depths = {"embeddings": 0, **{f"layer {layer}": layer + 1 for layer in layers}}
    decay = 1.0 if config.layer_decay is None else config.layer_decay
    scales = {part: decay ** (top - depths.get(part, top)) for part in parts}
    for part, rate in (("embeddings", config.embedding_learning_rate), ("head", config.head_learning_rate)):
        if rate is not None:
            scales[part] = rate / config.learning_rate
    return scales


def parameter_groups(model: nn.Module, config: TrainSection) -> list[Group]:
    """The trained parameters of a model by optimizer, learning rate and weight decay; vectors do not decay.

    Raises:
        ConfigError: there is a rate for the embeddings or the head, and they are not trained; or the package of the
            optimizer is not installed.
    """
    parameters = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    check_trained(trained, config)
    scales = rate_scales(parameters, config)
    groups: dict[tuple[str, float, float], Group] = {}
    for name, parameter in trained.items():
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        key = optimizer_of(name, parameter, config), scales[part_of(name)], decay
        groups.setdefault(key, Group(*key, [])).names.append(name)
    return list(groups.values())


def optimizer_of(name: str, parameter: nn.Parameter, config: TrainSection) -> str:
    """The optimizer of a parameter: with Muon, AdamW for all but the matrices of the layers."""
    is_inner = parameter.ndim == 2 and part_of(name).startswith("layer ")
    return "adamw" if config.optimizer == "muon" and not is_inner else config.optimizer


def moment_bytes(name: str, parameter: nn.Parameter, config: TrainSection) -> int:
    """The bytes that the optimizer keeps for each element of a trained parameter: one or two moments in float32."""
    return {"adamw": 8, "muon": 4, "lion": 4}[optimizer_of(name, parameter, config)]


def checkpoint_bytes(model: nn.Module, config: TrainSection) -> int:
    """The bytes of the tensors of a checkpoint: the trained weights in float32, their moments and their average."""
    other = 4 if config.ema_decay is None else 8
    return sum(
        (other + moment_bytes(name, parameter, config)) * parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


def lion() -> Any:
    """The class Lion of lion-pytorch. ConfigError if the package is not installed."""
    try:
        return import_module("lion_pytorch").Lion
    except ImportError as error:
        raise ConfigError("train.optimizer: lion needs the extra lion: pip install 'pyqemb[lion]'") from error


def check_trained(trained: Mapping[str, nn.Parameter], config: TrainSection) -> None:
    """ConfigError if a part of the model has a rate of its own, and is not trained, or the optimizer is missing."""
    if config.optimizer == "lion":
        lion()
    parts = {part_of(name) for name in trained}
    for part, key in (("embeddings", "embedding_learning_rate"), ("head", "head_learning_rate")):
        if getattr(config, key) is not None and part not in parts:
            whose = "a head of their own: rerankers with untied embeddings" if part == "head" else "trained embeddings"
            raise ConfigError(f"train.{key}: has no effect on this run; it is for models with {whose}")


def lines(model: nn.Module, config: TrainSection) -> Iterator[str]:
    """The lines of --dry-run about frozen parameters, the optimizer if it is not AdamW, and rates that differ."""
    parameters = dict(model.named_parameters())
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    if config.freeze:
        frozen = [parameter for name, parameter in parameters.items() if name not in trained]
        size, of = (sum(x.numel() for x in some) / 1e6 for some in (frozen, parameters.values()))
        yield f"frozen     {size:.2f} M of {of:.2f} M parameters, in {len(frozen)} of {len(parameters)} tensors"
    if config.optimizer != "adamw":
        names = [name for name in trained if optimizer_of(name, parameters[name], config) == config.optimizer]
        size = sum(parameters[name].numel() for name in names) / 1e6
        others = "" if len(names) == len(trained) else ", adamw for the others"
        yield f"optimizer  {config.optimizer} for {size:.2f} M parameters{others}"
    parts = {part_of(name) for name in trained}
    scales = {part: scale for part, scale in rate_scales(parameters, config).items() if part in parts}
    if any(scale != 1 for scale in scales.values()):
        rates = (f"{part} {config.learning_rate * scale:.3g}" for part, scale in _summary(scales))
        yield f"rates      at the peak: {', '.join(rates)}"


def _summary(scales: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """The parts with their scales; of three or more layers with a decay, only the first and the last."""
    layers = [part for part in scales if part.startswith("layer ")]
    hidden = set(layers[1:-1])
    for part, scale in scales.items():
        if part not in hidden:
            yield ("final norm" if part == "rest" else part), scale
