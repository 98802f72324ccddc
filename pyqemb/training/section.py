"""The base class of the sections of a configuration, and the values that are one name of a list."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import AfterValidator, ConfigDict, model_validator

from pyqemb.data.settings import StrictModel
from pyqemb.errors import ConfigError

ALIASES = {
    "lr": "learning_rate",
    "batch_size": "global_batch_size",
    "mrl_dims": "matryoshka",
    "gradient_checkpointing": "activation_checkpointing",
    "dtype": "precision",
}


class Section(StrictModel):
    """Frozen; unknown keys are refused."""

    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, values: Any) -> Any:
        return canonical(cls, values) if isinstance(values, Mapping) else values


def canonical(section: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values under the names of the section's fields instead of their aliases."""
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        name = ALIASES.get(key, key)
        name = name if name in section.model_fields else key
        if name in renamed:
            raise ConfigError(f"{key}: is the same as {name}, give one of them")
        renamed[name] = value
    return renamed


def size_in_bytes(text: str) -> int | None:
    """The bytes of a size like "12GB" or "1.5 GiB"; None where the text is no size."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]i?)B\s*", text)
    if match is None:
        return None
    power = "KMGT".index(match[2][0]) + 1
    found = int(float(match[1]) * (1024 if match[2].endswith("i") else 1000) ** power)
    if found < 1:
        raise ValueError("expected at least one byte")
    return found


def one_of(names: Iterable[str]) -> AfterValidator:
    """Return a validator for annotated types: the value must be one of the names."""
    known = tuple(names)

    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"expected one of {', '.join(known)}")
        return value

    return AfterValidator(check)
