"""Check a model folder before another library opens it.

Some loaders run code that a model folder names; these checks reject such folders.

sentence-transformers before 6 imports whatever `type` modules.json names and whatever activation a Dense module names;
transformers before 5.3 downloads kernels that config.json names.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pyqemb.data.folder import check_keys, member, one_of, read_json, shown
from pyqemb.errors import CheckpointError

_OLD, _BASE, _EMBED = (
    "sentence_transformers.models",
    "sentence_transformers.base.modules",
    "sentence_transformers.sentence_transformer.modules",
)
# class: every name that sentence-transformers 2 to 6 writes for it.
_PLACES = {
    "Transformer": (_OLD, f"{_BASE}.transformer", _BASE),
    "Pooling": (_OLD, f"{_EMBED}.pooling", _EMBED),
    "Normalize": (_OLD, f"{_BASE}.normalize", _BASE),
    "Dense": (_OLD, f"{_BASE}.dense", _BASE),
    "Dropout": (_OLD, f"{_EMBED}.dropout", _EMBED),
    "LayerNorm": (_OLD, f"{_EMBED}.layer_norm", _EMBED),
    "WeightedLayerPooling": (_OLD, f"{_EMBED}.weighted_layer_pooling", _EMBED),
    "StaticEmbedding": (_OLD, f"{_EMBED}.static_embedding", _EMBED),
    "LogitScore": (
        "sentence_transformers.cross_encoder.modules",
        "sentence_transformers.cross_encoder.modules.logit_score",
    ),
}
MODULES = {
    name: kind
    for kind, places in _PLACES.items()
    for place in places
    for name in (f"{place}.{kind}", *([f"{_OLD}.{kind}.{kind}"] if place == _OLD else []))
}
_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity",
    *(
        f"torch.nn.modules.activation.{name}"
        for name in (
            "Tanh", "GELU", "ReLU", "ReLU6", "LeakyReLU", "ELU", "SiLU", "Sigmoid", "Mish", "Softplus", "Hardtanh",
            "LogSigmoid", "SELU",
        )
    ),
}  # fmt: skip
_ACTIVATION_KEYS = ("activation_function", "activation_fn", "sbert_ce_default_activation_function")
_ATTENTION_KEYS = ("_attn_implementation", "attn_implementation")
# Attention implementations of transformers itself; any other name is a repository from which it downloads code.
_ATTENTIONS = (
    "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4",
    *(f"paged|{name}" for name in ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")),
)  # fmt: skip
_LONGEST_PATH = 255  # bytes, of a module inside the folder
_ADAPTER = "adapter_config.json"
_FIRST_READ = ("model.safetensors", "model.safetensors.index.json")  # without them loaders look for a pickle
_PICKLES = ("pytorch_model*.bin", "adapter_model*.bin", "*model*.pt", "*model*.pth", "*model*.ckpt", "*model*.pkl")


def check_safe(folder: str | Path) -> Path:
    """Return the folder if it cannot make a loader run code.

    Raises:
        CheckpointError: modules.json names a class that is not one of sentence-transformers' plain modules, or a path
            outside the folder; a configuration has `auto_map`, an attention implementation that is not one of
            transformers' own, `trust_remote_code`, an activation that is not one of torch, or `subfolder`, which makes
            loaders read files that are not checked; a file is a link that leaves the folder; weights are a pickle,
            also one that a loader reads because the weights beside it have another name; the folder or a module's
            folder holds an adapter, which some loaders apply to its weights, or to those of another base model, and
            others do not.
    """
    folder = Path(folder)
    for place in dict.fromkeys([folder, *(folder / module.path for module in read_modules(folder) or [])]):
        if (place / _ADAPTER).exists():
            raise CheckpointError(
                f"{place / _ADAPTER}: is an adapter, which would not be applied: `pyqemb export` with --adapter folds "
                "it into the weights of its base model"
            )
        for path in sorted(place.glob("*config*.json")):
            for key, value in _settings(read_json(folder, path.relative_to(folder).as_posix())):
                if makes_loaders_run_code(key, value):
                    raise CheckpointError(
                        f"{path}: {key!r} is refused: it makes loaders run code that comes with the model"
                    )
                if key == "subfolder" and value:
                    raise CheckpointError(
                        f"{path}: {key!r} is refused: it makes loaders read files that are not checked"
                    )
        for path in sorted(place.glob("*.safetensors")):
            member(folder, path.relative_to(folder).as_posix())
        pickles = sorted(path for pattern in _PICKLES for path in place.glob(pattern))
        if pickles and not any((place / name).is_file() for name in _FIRST_READ):
            raise CheckpointError(f"{pickles[0]}: is a pickle, which can run code: convert it to safetensors")
    return folder


def makes_loaders_run_code(key: str, value: Any) -> bool:
    """Whether a setting makes loaders run code of the folder or of another repository."""
    if key == "trust_remote_code":
        return bool(value)
    if key in _ACTIVATION_KEYS:  # sentence-transformers imports a dotted name; others are looked up in a table
        return isinstance(value, str) and "." in value and value not in _ACTIVATIONS
    if key == "_attn_implementation_autoset" and isinstance(value, bool):  # written by transformers 4
        return False
    if key.startswith(_ATTENTION_KEYS):
        names = value.values() if isinstance(value, dict) else [value]  # by the name of a sub-configuration
        return not all(name is None or (isinstance(name, str) and name in _ATTENTIONS) for name in names)
    return key == "auto_map"


class Module(NamedTuple):
    """One entry of modules.json: the class by its short name, and its folder inside the model's."""

    kind: str
    path: str


def read_modules(folder: Path) -> list[Module] | None:
    """The modules of modules.json in order; None without the file.

    Raises:
        CheckpointError: not a list of modules, an unknown key, a class that is not allowed, a path outside of the
            folder.
    """
    where, entries = folder / "modules.json", read_json(folder, "modules.json")
    if entries is None:
        return None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{where}: expected a list of modules")
    modules = []
    for entry in entries:
        check_keys(entry, {"idx": None, "name": None, "path": None, "type": None, "kwargs": one_of([], None)}, where)
        kind, path = MODULES.get(str(entry.get("type"))), entry.get("path")
        if kind is None:
            raise CheckpointError(
                f"{where}: type {shown(entry.get('type'))} is refused: known are sentence-transformers' "
                f"{', '.join(_PLACES)}, and loaders import what it names"
            )
        named = isinstance(path, str) and "\0" not in path and len(path.encode()) <= _LONGEST_PATH
        parts = PurePosixPath(path).parts if named else ("..",)
        if ".." in parts or PurePosixPath(*parts).is_absolute() or "\\" in str(path):
            raise CheckpointError(f"{where}: path must lie inside the folder, got {shown(path)}")
        member(folder, str(path))
        modules.append(Module(kind, path))
    return modules


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values at every level."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _settings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _settings(item)
