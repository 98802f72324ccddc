"""Merging of checkpoints tensor by tensor, so that only a few tensors are in memory."""

import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyqemb.data.arguments import checked
from pyqemb.data.folder import shown
from pyqemb.data.pairs import INSTRUCTION, PairTokenizer
from pyqemb.data.tokenizer import Tokenizer
from pyqemb.errors import CheckpointError, ConfigError, did_you_mean
from pyqemb.merging.slerp import Blend, fold, karcher, linear
from pyqemb.model.checkpoint import LM_HEAD, WEIGHTS, Stored, Tensors, file_order, stream_safetensors
from pyqemb.model.config import DecoderConfig
from pyqemb.model.decoder import Family
from pyqemb.model.families import FAMILIES, read_config
from pyqemb.model.portable import check_digests, model_folder, write_portable_files
from pyqemb.model.portable_reranker import files_like, reranker_name
from pyqemb.model.progress import progress_bar
from pyqemb.model.safety import check_safe
from pyqemb.model.sentence import (
    SentenceSettings,
    check_kind,
    kind_of,
    read_contract,
    read_instruction,
    read_sentence_settings,
)
from pyqemb.model.shard_files import ShardedTensors, shard_files

_MAX_STEP = 10**12  # a folder cannot have the name of a much longer number

METHODS: dict[str, Callable[[Iterator[Tensor], Sequence[float]], Blend]] = {
    "slerp": fold,
    "linear": lambda tensors, weights: linear(list(tensors), weights),
    "karcher": lambda tensors, weights: karcher(list(tensors), weights),
}


@dataclass(frozen=True)
class MergedTensor:
    """The largest angle while merging it, in degrees, and whether lerp was used instead of slerp."""

    name: str
    angle: float
    lerp: bool


@dataclass(frozen=True, repr=False)
class MergeReport:
    """The report of a merge; written to merge_report.json in the merged folder."""

    folder: str
    method: str
    checkpoints: list[str]
    weights: list[float]
    base: str | None
    tensors: list[MergedTensor]

    def __repr__(self) -> str:
        weights = ", ".join(f"{weight:.3g}" for weight in self.weights)
        lerp = f", {self.num_lerp} interpolated linearly" if self.num_lerp else ""
        return (
            f"MergeReport({self.method} of {len(self.checkpoints)} checkpoints, weights {weights}; "
            f"{len(self.tensors)} tensors, largest angle {self.max_angle:.2f} degrees{lerp}; model in {self.folder})"
        )

    @property
    def max_angle(self) -> float:
        """The largest angle between the tensors of one name, in degrees."""
        return max((tensor.angle for tensor in self.tensors), default=0.0)

    @property
    def num_lerp(self) -> int:
        """The number of tensors that were interpolated linearly instead of with slerp."""
        return sum(tensor.lerp for tensor in self.tensors)


@checked
def merge(
    checkpoints: Sequence[str | Path],
    method: str = "slerp",
    weights: Sequence[float] | None = None,
    base: str | Path | None = None,
    *,
    out: str | Path,
    settings_from: str | Path | None = None,
) -> MergeReport:
    """Merge checkpoints of one architecture into the model folder `out`.

    Args:
        checkpoints: two or more model folders with the same settings: tokenizer, prompts, maximum length, similarity.
            Names and dtypes are those of the first. If the training checkpoint of a bfloat16 model still exists in its
            run folder, its float32 weights are merged.
        method: "slerp" (default; folded in order, see `merging.slerp.fold`), "linear", or "karcher" (weighted
            Riemannian mean).
        weights: one for each checkpoint, not negative; they are normalized to sum to 1 (default: equal weights).
        base: a model folder. The differences from it are merged instead of the weights, and the result is added to it
            (task vectors; default: none).
        out: the folder of the merged model; an existing model folder is replaced once the new one is complete.
        settings_from: the checkpoint whose settings the merged model gets (default: the settings must not differ).

    Returns:
        The arguments, and the angle of each tensor, as in merge_report.json of the merged folder.

    Raises:
        ConfigError: invalid arguments, or architectures or settings that differ.
        CheckpointError: a tensor is missing, has another shape, is not finite or is opposite to another; the error
            names it. Nothing is written.

    Example:
        >>> from pyqemb.testing.tiny import write_tiny_folder
        >>> checkpoints = [write_tiny_folder("a", seed=0), write_tiny_folder("b", seed=1)]
        >>> pyqemb.merge(checkpoints, weights=[2, 1], out="merged")
        MergeReport(slerp of 2 checkpoints, weights 0.667, 0.333; ... tensors, largest angle ...; model in merged)

    Source: slerp of fine-tuned checkpoints as in the Qwen3 Embedding report (arXiv 2506.05176), section 3.
    """
    folders = [Path(checkpoint) for checkpoint in checkpoints]
    normalized = _checked_weights(folders, method, weights)
    root = None if base is None else Path(base)
    everything = folders if root is None else [*folders, root]
    for folder in everything:
        if Path(out).resolve() == folder.resolve():
            raise ConfigError(f"out: {out} is one of the checkpoints to be merged")
    for folder in everything:
        check_safe(folder)
    kinds = [kind_of(folder) or "embedder" for folder in folders]
    if len(set(kinds)) > 1:
        raise ConfigError(f"checkpoints: cannot merge {', '.join(dict.fromkeys(kinds))} with each other")
    for folder in everything:
        check_kind(folder, kinds[0])
    reranks = kinds[0] == "reranker"
    config = _common_config(everything, pooled=not reranks)
    chosen = _settings_folder(folders, settings_from, reranks, config)
    heads = () if reranks else (LM_HEAD,)
    family = FAMILIES[config.model_type]
    sources = [_checked_tensors(folder, heads, family) for folder in everything]
    _check_alike(sources)

    blend, first = METHODS[method], sources[0]
    merged: list[MergedTensor] = []
    provenance = {
        "merged": {
            "method": method, "checkpoints": [str(f) for f in folders], "weights": normalized,
            "base": None if root is None else str(root),
        }
    }  # fmt: skip
    if reranks:
        write_files = files_like(chosen, config, provenance)
    else:
        write_files = partial(
            write_portable_files, config=config, tokenizer=Tokenizer.from_folder(chosen),
            settings=_sentence_settings(chosen, config),
            matryoshka=config.extra.get("matryoshka_dimensions"), provenance=provenance,
        )  # fmt: skip
    names = {reranker_name(name) if reranks else name: name for name in first}
    stored = {there: Stored(first.dtype(name), first.shape(name)) for there, name in names.items()}

    def blended() -> Iterator[Tensor]:
        for there in file_order(stored):
            result = _blend_one(names[there], sources, len(folders), blend, normalized)
            merged.append(MergedTensor(names[there], result.angle, result.lerp))
            yield result.tensor.to(stored[there].dtype)
            advance(1)

    with model_folder(out, write_files) as temporary, progress_bar("Tensors", len(stored)) as advance:
        stream_safetensors(temporary / WEIGHTS, stored, blended())
        report = MergeReport(
            str(out), method, [str(f) for f in folders], normalized, None if root is None else str(root), merged
        )
        (temporary / "merge_report.json").write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    return report


def _blend_one(
    name: str, sources: Sequence[Tensors], count: int, blend: Callable[..., Blend], weights: Sequence[float]
) -> Blend:
    root = _finite(sources[count], name) if len(sources) > count else None

    def tensors() -> Iterator[Tensor]:
        for source in sources[:count]:
            tensor = _finite(source, name)
            yield tensor if root is None else tensor.to(_wide(tensor)) - root.to(_wide(tensor))

    try:
        result = blend(tensors(), weights)
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{name}: {error}") from error
    return result if root is None else Blend(result.tensor + root.to(result.tensor.dtype), result.angle, result.lerp)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _finite(source: Tensors, name: str) -> Tensor:
    tensor = source[name]
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{source.file(name)}: {name} holds NaN or infinity")
    return tensor


def _checked_weights(folders: Sequence[Path], method: str, weights: Sequence[float] | None) -> list[float]:
    if method not in METHODS:
        hint = did_you_mean(method, METHODS)
        raise ConfigError(f"method: must be one of {', '.join(METHODS)}, got {method!r}{hint}")
    if len(folders) < 2:
        raise ConfigError(f"checkpoints: two or more are needed, got {len(folders)}")
    weights = [1.0] * len(folders) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(folders):
        raise ConfigError(f"weights: one for each of the {len(folders)} checkpoints is needed, got {len(weights)}")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or sum(weights) <= 0:
        raise ConfigError(f"weights: must be finite, not negative and not all zero, got {weights}")
    return [weight / sum(weights) for weight in weights]


def _common_config(folders: Sequence[Path], pooled: bool) -> DecoderConfig:
    """The common configuration; ConfigError names a difference."""
    configs = [read_config(folder) for folder in folders]
    poolings = [_sentence_settings(folder, configs[0]).pooling if pooled else None for folder in folders]
    for folder, config, pooling in zip(folders[1:], configs[1:], poolings[1:], strict=True):
        before, now = asdict(configs[0]), asdict(config)
        for key in ("extra", "initializer_range", "eos_token_id", "max_position_embeddings"):
            before.pop(key, None), now.pop(key, None)
        for key, value in before.items():
            if now[key] != value:
                raise ConfigError(f"{folder}: {key} is {now[key]!r}, {value!r} in {folders[0]}")
        if pooling != poolings[0]:
            raise ConfigError(f"{folder}: pooling is {pooling!r}, {poolings[0]!r} in {folders[0]}")
    return configs[0]


def _settings_folder(
    folders: Sequence[Path], settings_from: str | Path | None, reranks: bool, config: DecoderConfig
) -> Path:
    """The checkpoint whose settings the merged model gets; ConfigError if they differ and none was chosen."""
    if settings_from is not None:
        for folder in folders:
            if folder.resolve() == Path(settings_from).resolve():
                return folder
        raise ConfigError(f"settings_from: must be one of the checkpoints, got {settings_from}")
    first, *others = [_settings(folder, reranks, config) for folder in folders]
    for folder, settings in zip(folders[1:], others, strict=True):
        for key, value in first.items():
            if settings[key] != value:
                seen = "" if key == "tokenizer" else f": {shown(settings[key])}, {shown(value)}"
                raise ConfigError(
                    f"{folder}: {key} differs from {folders[0]}{seen}; settings_from (--settings-from) names the "
                    "checkpoint whose settings the merged model gets"
                )
    return folders[0]


def _settings(folder: Path, reranks: bool, config: DecoderConfig) -> dict[str, Any]:
    tokenizer = PairTokenizer.from_folder(folder) if reranks else Tokenizer.from_folder(folder)
    found: dict[str, Any] = {
        "max_length": tokenizer.max_length or config.max_tokens, "do_lower_case": tokenizer.lower_case,
        "end_token": tokenizer.end_token, "tokenizer": tokenizer.backend.to_str(),
    }  # fmt: skip
    if reranks:
        return {"instruction": read_instruction(folder, INSTRUCTION), **found}
    own = vars(_sentence_settings(folder, config))
    return {**own, "matryoshka_dimensions": read_config(folder).extra.get("matryoshka_dimensions"), **found}


def _sentence_settings(folder: Path, config: DecoderConfig) -> SentenceSettings:
    return read_sentence_settings(folder, config.hidden_size, config.default_pooling)


def _checked_tensors(folder: Path, heads: Collection[str], family: Family) -> Tensors:
    check_digests(folder)
    return _Unrounded(folder, heads, family)


class _Unrounded(Tensors):
    """A model folder whose tensors are read from its training checkpoint, if they round to the stored ones."""

    def __init__(self, folder: Path, heads: Collection[str], family: Family):
        super().__init__(folder, heads, family=family)
        self._checkpoint, self._kind, self._names = ShardedTensors([]), "", dict[str, str]()
        try:
            provenance = read_contract(folder)["provenance"]
            step, averaged = provenance["step"], provenance.get("weights") == "ema"  # the averages of train.ema_decay
        except (KeyError, TypeError, AttributeError):
            return
        if type(step) is not int or not 0 <= step < _MAX_STEP:
            return
        checkpoint = folder.parent / "checkpoints" / f"step_{step:08}"
        self._checkpoint = ShardedTensors(shard_files(checkpoint, "optimizer" if averaged else "model"))
        self._kind = "/ema" if averaged else ""
        ours = (key.removeprefix("model.").removesuffix(self._kind) for key in self._checkpoint)
        self._names = {family.stored_name(name): name for name in ours}

    def __getitem__(self, name: str) -> Tensor:
        rounded = super().__getitem__(name)
        key = f"model.{self._names.get(name, name)}{self._kind}"
        if key not in self._checkpoint:
            return rounded
        exact = self._checkpoint[key]
        return exact if torch.equal(exact.to(rounded.dtype), rounded) else rounded


def _check_alike(sources: Sequence[Tensors]) -> None:
    first = sources[0]
    for other in sources[1:]:
        missing, surplus = sorted(set(first) - set(other)), sorted(set(other) - set(first))
        if missing or surplus:
            raise CheckpointError(
                f"{other.folder}: missing {missing[:5]}, surplus {surplus[:5]} (compared with {first.folder})"
            )
        for name in first:
            first.dtype(name), other.dtype(name)  # raises unless floating point
            if other.shape(name) != first.shape(name):
                raise CheckpointError(
                    f"{other.folder}: {name} has shape {other.shape(name)}, {first.shape(name)} in {first.folder}"
                )
