"""The decoder families, one file for each.

A file defines how config.json is read, and the parts and the weight names of the decoder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyqemb.data.folder import read_json
from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.model.config import DecoderConfig
from pyqemb.model.decoder import Decoder, Family
from pyqemb.model.families import bert, distilbert, llama, mistral, qwen2, qwen3, roberta
from pyqemb.model.safety import makes_loaders_run_code

FAMILIES: dict[str, Family] = {
    family.config.model_type: family
    for family in (
        qwen3.FAMILY, qwen2.FAMILY, llama.FAMILY, mistral.FAMILY, bert.FAMILY, roberta.FAMILY, roberta.XLM_FAMILY,
        distilbert.FAMILY,
    )
}  # fmt: skip


def build_decoder(config: DecoderConfig) -> Decoder:
    """The decoder of a configuration, with torch's weight initialization."""
    return Decoder(config, FAMILIES[config.model_type])


def read_config(folder: str | Path) -> DecoderConfig:
    """Read `config.json` of a model folder; CheckpointError if it is missing or not supported."""
    path = Path(folder) / "config.json"
    values = read_json(Path(folder), "config.json")
    if values is None:
        final = next((name for name in ("final", "best") if (Path(folder) / name / "config.json").is_file()), None)
        hint = f"; it is the folder of a run, whose model is in {Path(folder) / final}" if final else ""
        raise CheckpointError(f"{folder}: has no config.json{hint}")
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    try:
        return parse_config(values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def parse_config(values: Mapping[str, Any]) -> DecoderConfig:
    """The configuration from the keys of a Hugging Face config.

    Raises:
        ConfigError: an unknown model_type, a setting that is not known or not supported.
    """
    for name, value in values.items():
        if makes_loaders_run_code(name, value):
            raise ConfigError(f"{name!r} is refused: it makes loaders run code that comes with the model")
    model_type = values.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        refused = f"model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}"
        if model_type == "mpnet":
            refused += ": its attention adds a relative position bias, which varlen_attention does not have"
        raise ConfigError(refused)
    _check_architectures(values.get("architectures"))
    return family.config.from_dict(values)


def _check_architectures(architectures: Any) -> None:
    known = [name for family in FAMILIES.values() for name in family.config.architectures]
    if architectures is not None and (
        not isinstance(architectures, list) or any(a not in known for a in architectures)
    ):
        raise ConfigError(f"architectures must be among {', '.join(known)}, got {architectures!r}")
