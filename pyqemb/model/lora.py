"""Low-rank adapters on the packed decoder: x W^T + scale (x A^T) B^T. They are written and read in peft's format.

Source: Hu et al. 2021, arXiv 2106.09685; rank-stabilized scale, Kalajdzievski 2023, arXiv 2312.03732. Legend: R rank, I
and O features in and out.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pyqemb.data.arguments import Count, NotNegative, check_fields, checked
from pyqemb.data.files import atomic_folder
from pyqemb.data.folder import Rule, check_keys, one_of, read_object
from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.model.checkpoint import Tensors, write_safetensors
from pyqemb.model.decoder import Decoder
from pyqemb.model.linear import Linear, Lora
from pyqemb.model.shards import full_tensor, is_writer, local, own_rows
from pyqemb.model.source import named_dtype

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NOTHING: Rule = lambda value: not value  # noqa: E731
_NAMES: Rule = lambda value: value is None or isinstance(value, str | list)  # noqa: E731
# Every setting of peft's LoraConfig (and of its base classes), and the values with which an adapter is x W^T + scale (x
# A^T) B^T.
_SETTINGS: dict[str, Rule | None] = {
    "peft_type": one_of("LORA"),
    "r": lambda value: type(value) is int and value > 0,
    "lora_alpha": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "lora_dropout": lambda value: (
        value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1)
    ),
    "use_rslora": one_of(True, False, None),
    "target_modules": _NAMES,  # the tensors define which modules have an adapter
    "exclude_modules": _NAMES,
    "layers_pattern": _NAMES,
    # The other methods change the base weights that the adapter was trained for: pissa, olora, corda, loftq, lora_ga.
    "init_lora_weights": one_of(True, False, None, "gaussian", "eva", "orthogonal"),
    "bias": one_of("none"),
    "inference_mode": one_of(True, False, None),
    "task_type": lambda value: value is None or isinstance(value, str),
    "base_model_name_or_path": None,  # the origin of the adapter
    "revision": None,
    "peft_version": None,
    "eva_config": None,  # settings of the initialization
    "megatron_core": None,
    "qalora_group_size": None,  # used only with use_qalora
    "runtime_config": None,
    **dict.fromkeys(
        ("use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform",
         "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens",
         "auto_mapping", "loftq_config", "corda_config", "lora_ga_config", "velora_config", "use_qalora",
         "monteclora_config", "use_bdlora", "arrow_config", "kasa_config", "megatron_config",
         "ensure_weight_tying"), _NOTHING
    ),
}  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """scale = alpha / rank, or alpha / sqrt(rank) with `rank_stabilized`. ConfigError: a value out of range."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    dropout: float = 0.0
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rank < 1:
            raise ConfigError(f"lora.rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout must lie in 0..1, got {self.dropout}")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise ConfigError(f"lora.targets must be among {', '.join(TARGETS)}, got {list(self.targets)}")

    @property
    def scale(self) -> float:
        """The factor of the adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


@checked
def add_lora(model: Decoder, config: LoraConfig, seed: NotNegative = 0) -> None:
    """Freeze the model and add new adapters to its targets, which do not change its output yet (B is zero).

    The initial weights depend only on the seed.
    """
    if adapted(model):
        raise ConfigError("the model has adapters already; merge_lora folds them into its weights")
    targets = _targets(model, config.targets)
    if not targets:
        raise ConfigError(
            f"lora.targets: a model of type {model.config.model_type!r} has none of {', '.join(config.targets)}"
        )
    model.requires_grad_(False)
    for _, linear in targets:
        weight = linear.weight
        a_RI, b_OR = weight.new_empty(config.rank, weight.shape[1]), weight.new_empty(weight.shape[0], config.rank)
        linear.lora = Lora(a_RI, b_OR, config.scale, config.dropout)
    reset_lora(model, seed)


@checked
@torch.no_grad()
def reset_lora(model: Decoder, seed: NotNegative = 0) -> None:
    """Set the initial weights of the adapters, the same for the same seed; sharded adapters get their rows of them."""
    generator = torch.Generator().manual_seed(seed)
    for linear in adapted(model).values():
        lora = linear.lora
        assert lora is not None
        bound = 1 / math.sqrt(lora.A.shape[1])  # the initialization of peft and nn.Linear
        a_RI = (torch.rand(lora.A.shape, generator=generator) * 2 - 1) * bound
        local(lora.A).copy_(a_RI[own_rows(lora.A)])
        local(lora.B).zero_()


@checked
def adapted(model: nn.Module) -> dict[str, Linear]:
    """The modules that have an adapter, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear) and m.lora is not None}


class MergedParameters(Mapping[str, torch.Tensor]):
    """The parameters by name, with the adapters merged in; each is computed on access.

    Args:
        model: the decoder; it may be on the meta device if `read` is given.
        read: returns the parameter of a name, detached (default: the model's, which shares its memory).
    """

    @checked
    def __init__(self, model: Decoder, read: Callable[[str], torch.Tensor] | None = None):
        self._parameters = dict(model.named_parameters())
        self._read = read or (lambda name: self._parameters[name].detach())
        self._adapted = {f"{name}.weight": linear for name, linear in adapted(model).items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        weight, linear = self._read(name), self._adapted.get(name)
        if linear is None or linear.lora is None:
            return weight
        a_RI, b_OR = (self._read(f"{name.removesuffix('weight')}lora.{side}") for side in "AB")
        return _folded(weight, a_RI, b_OR, linear.lora.scale)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._parameters if ".lora." not in name)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @checked
    def shape(self, name: str) -> torch.Size:
        """The shape of a parameter, without computing it. ConfigError: there is none of this name."""
        if name not in self._parameters:
            raise ConfigError(f"[shape] name must be that of a parameter, got {name!r}")
        return self._parameters[name].shape


@checked
def merge_lora(model: Decoder) -> None:
    """Merge the adapters into the weights, which become trainable again."""
    merged = MergedParameters(model)
    with torch.no_grad():
        for name, linear in adapted(model).items():
            linear.weight.copy_(merged[f"{name}.weight"])
            linear.lora = None
    model.requires_grad_(True)


@checked
def save_adapter(
    model: Decoder,
    folder: str | Path,
    base: str | None = None,
    task_type: Literal["FEATURE_EXTRACTION", "CAUSAL_LM"] = "FEATURE_EXTRACTION",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the adapters as a folder that `peft.PeftModel.from_pretrained` loads on the base model.

    Args:
        model: a decoder with adapters. If its weights are sharded, every rank calls this, and rank 0 writes.
        folder: the folder to write.
        base: the name of the base model in adapter_config.json.
        task_type: "CAUSAL_LM": for the same decoder under a language-model head.
        dtype: the dtype of the adapters in the folder (default: the parameters' own).

    Raises:
        ConfigError: the model has no adapters, or adapters of different ranks or scales.
    """
    dtype = named_dtype(dtype)
    layers = adapted(model)
    if not layers:
        raise ConfigError("the model has no adapters to save")
    loras = {name: linear.lora for name, linear in layers.items() if linear.lora is not None}
    (rank, scale), *others = {(len(lora.A), lora.scale) for lora in loras.values()}
    if others:
        raise ConfigError("the adapters differ in rank or scale; peft's plain format holds one of each")
    inner = "model." if task_type == "CAUSAL_LM" else ""
    tensors = {
        f"{_PREFIX}{inner}{model.family.stored_name(name)}.lora_{side}.weight": full_tensor(
            getattr(lora, side), dtype or lora.A.dtype
        ).to(dtype or lora.A.dtype)
        for name, lora in loras.items()
        for side in "AB"
    }
    settings: dict[str, Any] = {
        "peft_type": "LORA", "task_type": task_type, "base_model_name_or_path": base, "r": rank,
        "lora_alpha": scale * rank, "lora_dropout": next(iter(loras.values())).dropout.p,
        "target_modules": _peft_targets(model, loras),
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "use_rslora": False,
        "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    return _write(folder, tensors, settings) if is_writer(model) else Path(folder)


@checked
def load_adapter(model: Decoder, folder: str | Path) -> None:
    """Load the adapters of a peft folder (plain LoRA on the projections) and freeze all other parameters.

    Raises CheckpointError, which names the file: an unsupported setting, a tensor that is missing, surplus, or of
    another shape. ConfigError: the model has adapters already.
    """
    if adapted(model):
        raise ConfigError("the model has adapters already; merge_lora folds them into its weights")
    adapter = read_adapter(folder)
    layers = {model.family.stored_name(name): m for name, m in model.named_modules() if isinstance(m, Linear)}
    for name, (a_RI, b_OR) in adapter.pairs.items():
        linear = layers.get(name)
        if linear is None:
            raise CheckpointError(f"{folder}: has an adapter for {name}, which the model does not have")
        wanted = (b_OR.shape[0], a_RI.shape[1])
        if tuple(linear.weight.shape) != wanted or a_RI.shape[0] != b_OR.shape[1]:
            raise CheckpointError(
                f"{folder}: the adapter of {name} is for a weight of shape {list(wanted)}, the model has "
                f"{list(linear.weight.shape)}"
            )
    model.requires_grad_(False)
    for name, (a_RI, b_OR) in adapter.pairs.items():
        weight = layers[name].weight
        layers[name].lora = Lora(a_RI.to(weight), b_OR.to(weight), adapter.scale, adapter.dropout)


@checked
def merge_adapters(
    folders: Sequence[str | Path], weights: Sequence[float] | None = None, *, out: str | Path, rank: Count | None = None
) -> Path:
    """Write the weighted sum of adapters of one base model as one adapter.

    Args:
        folders: two or more adapter folders.
        weights: one for each adapter, which may be negative (default: equal weights that add up to 1).
        out: the folder of the merged adapter.
        rank: the rank of the result; it is then the best approximation in the Frobenius norm, by SVD (default: the sum
            of the ranks, which is exact).

    Returns:
        The folder of the merged adapter.

    Raises:
        ConfigError: fewer than two adapters, or another number of weights than adapters.
        CheckpointError: as in `load_adapter`, or the adapters are for different modules.
    """
    if len(folders) < 2:
        raise ConfigError(f"adapters: two or more are needed, got {len(folders)}")
    factors = [1 / len(folders)] * len(folders) if weights is None else list(weights)
    if len(factors) != len(folders) or not all(map(math.isfinite, factors)):
        raise ConfigError(f"weights: one number for each of the {len(folders)} adapters is needed, got {factors}")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, got {rank}")
    adapters = [read_adapter(folder) for folder in folders]
    first = adapters[0]
    tensors: dict[str, torch.Tensor] = {}
    for adapter in adapters[1:]:
        shapes = [{name: (b.shape[0], a.shape[1]) for name, (a, b) in one.pairs.items()} for one in (first, adapter)]
        if shapes[0] != shapes[1] or adapter.inner != first.inner:
            raise CheckpointError(f"{adapter.folder}: its adapters are not for the modules of {first.folder}")
    for name in first.pairs:
        a_RI = torch.cat([adapter.pairs[name][0].float() for adapter in adapters])
        b_OR = torch.cat(
            [factor * one.scale * one.pairs[name][1].float() for factor, one in zip(factors, adapters, strict=True)],
            dim=1,
        )
        if rank is not None:
            a_RI, b_OR = _nearest(a_RI, b_OR, rank)
        for side, tensor in (("A", a_RI), ("B", b_OR)):
            tensors[f"{_PREFIX}{first.inner}{name}.lora_{side}.weight"] = tensor
    size = len(next(iter(tensors.values())))
    settings = {**first.settings, "r": size, "lora_alpha": size, "use_rslora": False}
    return _write(out, tensors, settings)


@dataclass(frozen=True)
class Adapter:
    """A peft folder: (A, B) by module of the decoder; `inner` is the prefix of its names."""

    folder: Path
    settings: Mapping[str, Any]
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scale: float
    dropout: float
    inner: str


@checked
def read_adapter(folder: str | Path) -> Adapter:
    """Read a peft folder; CheckpointError as in `load_adapter`."""
    folder = Path(folder)
    path = folder / CONFIG
    settings = read_object(folder, CONFIG)
    try:
        rank, alpha = settings["r"], settings["lora_alpha"]
    except KeyError as error:
        raise CheckpointError(f"{path}: not a LoRA adapter: {error!r}") from error
    check_keys(settings, {name: _SETTINGS.get(name, _NOTHING) for name in settings}, path)
    pickled = [file.name for file in folder.glob("adapter_model.bin")]
    if pickled and not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder / pickled[0]}: is a pickle, which can run code: convert it to safetensors")
    tensors = Tensors(folder, heads=(), file=WEIGHTS)
    found: dict[str, dict[str, torch.Tensor]] = {}
    inner = "model." if any(name.startswith(f"{_PREFIX}model.") for name in tensors) else ""
    for name in tensors:
        module, _, side = name.removeprefix(_PREFIX + inner).removesuffix(".weight").rpartition(".lora_")
        if not name.startswith(_PREFIX + inner) or side not in ("A", "B"):
            raise CheckpointError(f"{tensors.file(name)}: {name} is not a weight of a LoRA adapter")
        if not torch.isfinite(tensors[name]).all():
            raise CheckpointError(f"{tensors.file(name)}: {name} holds NaN or infinity")
        found.setdefault(module, {})[side] = tensors[name].clone()
    for module, sides in found.items():
        if set(sides) != {"A", "B"} or len(sides["A"]) != rank:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {module} does not have the two matrices of an adapter of rank {rank}"
            )
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    pairs = {module: (sides["A"], sides["B"]) for module, sides in found.items()}
    return Adapter(folder, settings, pairs, scale, float(settings.get("lora_dropout") or 0.0), inner)


def _write(folder: str | Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> Path:
    """Write the folder completely or not at all; ConfigError if it exists and is not an adapter."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder}: exists and is not an adapter; refusing to replace it")
    with atomic_folder(folder) as temporary:
        write_safetensors(temporary / WEIGHTS, tensors)
        (temporary / CONFIG).write_text(json.dumps(dict(settings), indent=2) + "\n", encoding="utf-8")
    return folder


def _targets(model: Decoder, names: Sequence[str]) -> list[tuple[str, Linear]]:
    return [
        (name, m) for name, m in model.named_modules() if isinstance(m, Linear) and name.rpartition(".")[2] in names
    ]


def _peft_targets(model: Decoder, names: Iterable[str]) -> list[str]:
    """The modules of that name for peft: their last components, or full names where checkpoints have other names."""
    stored = {name: model.family.stored_name(name) for name in names}
    last = {name: name.rpartition(".")[2] for name in stored}
    renamed = any(theirs.rpartition(".")[2] != last[name] for name, theirs in stored.items())
    return sorted(stored.values() if renamed else {*last.values()})


def _folded(weight_OI: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scale: float) -> torch.Tensor:
    """W + scale B A, in float32 or wider."""
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    delta = scale * (b_OR.to(wide) @ a_RI.to(wide))
    return (weight_OI.to(wide) + delta).to(weight_OI.dtype)


def _nearest(a_RI: torch.Tensor, b_OR: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of the given rank whose product is nearest to B A. Only small matrices are decomposed."""
    q_OR, left_RR = torch.linalg.qr(b_OR.double())
    q_IR, right_RR = torch.linalg.qr(a_RI.double().T)
    u, s, v = torch.linalg.svd(left_RR @ right_RR.T)
    root = s[:rank].sqrt()
    return ((root[:, None] * v[:rank]) @ q_IR.T).float(), (q_OR @ (u[:, :rank] * root)).float()
