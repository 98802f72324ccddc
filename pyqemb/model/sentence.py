"""The settings of a model folder other than the decoder: pooling, normalization, prompts, similarity.

Every setting is applied, or raises an error that names it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pyqemb.data.folder import Rule, check_keys, one_of, read_json, read_object, shown
from pyqemb.data.tokenizer import TEMPLATE
from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.model.safety import Module, read_modules
from pyqemb.model.similarity import SIMILARITIES, check_similarity

Kind = Literal["embedder", "reranker"]
CONTRACT = "pyqemb.json"
SETTINGS = "config_sentence_transformers.json"
POOLINGS = {"last": "lasttoken", "mean": "mean", "cls": "cls", "weighted_mean": "weightedmean"}
DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
DEFAULT_PROMPTS = {"query": TEMPLATE.format(task=DEFAULT_INSTRUCTION, query=""), "document": ""}
MODE_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


@dataclass(frozen=True)
class SentenceSettings:
    """How hidden states become the vectors of an embedding model.

    Attributes:
        pooling: "last", "mean", "cls" (the first token) or "weighted_mean" (see `Embedder`).
        prompts: prefixes of texts by name; encode_query uses "query", encode_document "document".
        default_prompt_name: the prompt of `encode`; None: none.
        similarity_fn_name: "cosine", "dot", "euclidean" or "manhattan".
        truncate_dim: vectors are truncated to this many dimensions, after normalization. None: all.
        normalize: whether vectors have unit length.

    Raises:
        ConfigError: a value out of range, or incompatible values.
    """

    pooling: str = "last"
    prompts: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_PROMPTS))
    default_prompt_name: str | None = None
    similarity_fn_name: str = "cosine"
    truncate_dim: int | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ConfigError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if self.default_prompt_name is not None and self.default_prompt_name not in self.prompts:
            raise ConfigError(
                f"default_prompt_name must be one of the prompts {', '.join(self.prompts)}, got "
                f"{self.default_prompt_name!r}"
            )
        check_similarity(self.similarity_fn_name)
        if not self.normalize and self.similarity_fn_name != "cosine":  # mining and evaluation compare unit vectors
            raise ConfigError(
                f"similarity_fn_name {self.similarity_fn_name!r} is not supported without a Normalize module"
            )
        if self.truncate_dim is not None and (type(self.truncate_dim) is not int or self.truncate_dim < 1):
            raise ConfigError(f"truncate_dim must be a positive whole number, got {self.truncate_dim!r}")


def read_sentence_settings(folder: Path, hidden_size: int, default_pooling: str = "last") -> SentenceSettings:
    """Read modules.json, the files of its modules and config_sentence_transformers.json.

    Without modules.json: `default_pooling` unless 1_Pooling says otherwise, and the prompts of Qwen3-Embedding unless
    config_sentence_transformers.json holds others.

    Raises:
        CheckpointError: an unsupported module, setting or value; the error names file, key and value.
    """
    modules = read_modules(folder)
    if modules is None:
        pooling, normalize = _read_pooling(folder, "1_Pooling", hidden_size), True
    else:
        kinds = [module.kind for module in modules]
        if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
            raise CheckpointError(
                f"{folder / 'modules.json'}: expected the modules Transformer, Pooling and Normalize, got "
                f"{', '.join(kinds)}"
            )
        _check_root(folder, modules[0])
        for module in modules[1:]:
            _check_own_folder(folder, module)
        pooling, normalize = _read_pooling(folder, modules[1].path, hidden_size), len(kinds) == 3
        if pooling is None:
            raise CheckpointError(f"{folder / modules[1].path}: has no config.json of the Pooling module")
        for module in modules[2:]:
            path = f"{module.path}/config.json"
            check_keys(read_object(folder, path), _NORMALIZE, folder / path)
    stored = read_json(folder, SETTINGS)
    values = read_object(folder, SETTINGS)
    check_keys(values, {**_SETTINGS, "model_type": one_of("SentenceTransformer", None)}, folder / SETTINGS)
    prompts = {} if modules is not None or stored is not None else DEFAULT_PROMPTS
    try:
        return SentenceSettings(
            pooling or default_pooling,
            {"query": "", "document": "", **prompts, **_prompts(folder, values)},
            values.get("default_prompt_name"),
            values.get("similarity_fn_name") or "cosine",
            values.get("truncate_dim"),
            normalize,
        )
    except ConfigError as error:
        raise CheckpointError(f"{folder / SETTINGS}: {error}") from error


def read_contract(folder: Path) -> dict[str, Any]:
    """Read pyqemb.json; empty if there is none.

    Raises:
        CheckpointError: an unknown key, or an invalid value of a key that is used. Keys that only record how the folder
            was made (pooling, attention, lengths) are not compared with the files that define these settings.
    """
    values = read_object(folder, CONTRACT)
    check_keys(values, _CONTRACT, folder / CONTRACT)
    return values


def check_kind(folder: Path, wanted: Kind) -> None:
    """CheckpointError unless the folder holds that kind of model, or a language model, which can be used as either."""
    found, reason = _kind(folder)
    if found not in (None, wanted):
        names = {"embedder": "an embedding model", "reranker": "a reranker"}
        raise CheckpointError(f"{folder}: is {names[found]} ({reason}), not {names[wanted]}")


def kind_of(folder: Path) -> Kind | None:
    """The kind of model in a folder; None for a language model."""
    return _kind(folder)[0]


def check_reranker_modules(folder: Path, yes_id: int, no_id: int) -> None:
    """CheckpointError unless modules.json is absent or describes a Reranker."""
    modules = read_modules(folder)
    if modules is None:
        return
    kinds = [module.kind for module in modules]
    if kinds not in (["Transformer"], ["Transformer", "LogitScore"]):
        raise CheckpointError(
            f"{folder / 'modules.json'}: expected the modules Transformer and LogitScore, got {', '.join(kinds)}"
        )
    _check_root(folder, modules[0])
    for module in modules[1:]:
        _check_own_folder(folder, module)
        path = f"{module.path}/config.json"
        rules: dict[str, Rule | None] = {
            "true_token_id": one_of(yes_id), "false_token_id": one_of(no_id),
            "module_input_name": one_of("causal_logits"),
        }  # fmt: skip
        values = {"true_token_id": None, "false_token_id": None, **read_object(folder, path)}
        check_keys(values, rules, folder / path)


def read_instruction(folder: Path, default: str) -> str:
    """Return the instruction of a reranker.

    It is that of pyqemb.json, else the default prompt of config_sentence_transformers.json, else `default`.
    """
    stored = read_contract(folder).get("instruction")
    if stored:
        return stored
    values = read_object(folder, SETTINGS)
    check_keys(
        values, {**_SETTINGS, "model_type": one_of("CrossEncoder", None), "activation_fn": None}, folder / SETTINGS
    )
    return _prompts(folder, values).get(str(values.get("default_prompt_name"))) or default


def _kind(folder: Path) -> tuple[Kind | None, str]:
    if read_json(folder, CONTRACT) is not None:
        return read_contract(folder).get("kind", "embedder"), f"{CONTRACT} says so"
    modules = read_modules(folder)
    model_type = read_object(folder, SETTINGS).get("model_type")
    if model_type == "CrossEncoder" or any(module.kind == "LogitScore" for module in modules or []):
        return "reranker", f"{SETTINGS if model_type == 'CrossEncoder' else 'modules.json'} says so"
    if modules is not None:
        return "embedder", "modules.json says so"
    architectures = read_object(folder, "config.json").get("architectures") or []
    if any(str(name).endswith("ForSequenceClassification") for name in architectures):
        return "reranker", "config.json says so: architectures"
    return None, ""


def _check_root(folder: Path, transformer: Module) -> None:
    if transformer.path not in ("", "."):
        raise CheckpointError(
            f"{folder / 'modules.json'}: the Transformer must lie in the folder itself, got the path "
            f"{shown(transformer.path)}"
        )


def _check_own_folder(folder: Path, module: Module) -> None:
    if module.path in ("", "."):
        raise CheckpointError(
            f"{folder / 'modules.json'}: the {module.kind} module must have a folder of its own, got the path "
            f"{shown(module.path)}"
        )


def _read_pooling(folder: Path, place: str, hidden_size: int) -> str | None:
    """The mode of the pooling module, by our name, in either of its formats; None without a file."""
    path = f"{place}/config.json"
    values = read_object(folder, path)
    if not values:
        return None
    rules: dict[str, Rule | None] = {"pooling_mode": None, **dict.fromkeys(MODE_KEYS.values(), one_of(True, False))}
    rules |= dict.fromkeys(("word_embedding_dimension", "embedding_dimension"), one_of(hidden_size))
    check_keys(values, {**rules, "include_prompt": one_of(True, False)}, folder / path)
    active = [mode for mode, key in MODE_KEYS.items() if values.get(key)] or ["mean"]
    modes = values.get("pooling_mode", active)
    modes = [modes] if isinstance(modes, str) else modes
    known = {theirs: ours for ours, theirs in POOLINGS.items()}
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in list(known):
        raise CheckpointError(f"{folder / path}: pooling must be one of {', '.join(known)}, got {modes}")
    if values.get("include_prompt") is False and modes != ["lasttoken"]:  # the last token is not part of the prompt
        raise CheckpointError(f"{folder / path}: include_prompt False is not supported with {modes[0]} pooling")
    contradicting = [key for mode, key in MODE_KEYS.items() if values.get(key) and mode != modes[0]]
    if contradicting:
        raise CheckpointError(f"{folder / path}: {contradicting[0]} true contradicts pooling_mode {shown(modes[0])}")
    return known[modes[0]]


def _prompts(folder: Path, values: Mapping[str, Any]) -> dict[str, str]:
    prompts = {} if values.get("prompts") is None else values["prompts"]
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise CheckpointError(f"{folder / SETTINGS}: prompts must map names to texts, got {shown(prompts)}")
    return prompts


_SETTINGS: dict[str, Rule | None] = {
    "__version__": None,
    "prompts": None,  # read
    "default_prompt_name": lambda value: value is None or isinstance(value, str),  # read
    "similarity_fn_name": one_of(*SIMILARITIES, None),  # read
    "truncate_dim": None,  # read
}
_CONTRACT: dict[str, Rule | None] = {
    "kind": one_of("embedder", "reranker"),  # read
    "format": one_of("causal-lm", "seq-cls"),  # read
    "instruction": lambda value: value is None or isinstance(value, str),  # read
    "sha256": None,  # read
    **dict.fromkeys(
        ("pyqemb_version", "pooling", "attention", "dims", "end_token", "end_token_id", "query_template", "max_length",
         "yes_id", "no_id"), None
    ),
    "provenance": lambda value: value is None or isinstance(value, dict),  # read
}  # fmt: skip
_NORMALIZE: dict[str, Rule | None] = {
    "module_input_name": one_of("sentence_embedding"),
    "module_output_name": one_of("sentence_embedding", None),
}
