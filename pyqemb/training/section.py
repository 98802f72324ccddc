"""The base class of configuration sections, and the type of values that are one name of a list."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function

from pyqemb.data.settings import StrictModel
from pyqemb.data.settings_keys import ALIAS_OF
from pyqemb.errors import ConfigError

ALIASES = {
    "lr": "learning_rate",
    "batch_size": "global_batch_size",
    "mrl_dims": "matryoshka",
    "gradient_checkpointing": "activation_checkpointing",
    "dtype": "precision",
}
SIZE_PATTERN = r"^\s*(\d+\.?\d*|\.\d+)\s*([KMGT]i?)B\s*$"


class Section(StrictModel):
    """A frozen section; unknown keys are errors."""

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, values: Any) -> Any:
        return canonical(cls, values) if isinstance(values, Mapping) else values

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for alias, name in ALIASES.items():
            if name in properties:
                properties[alias] = {**properties[name], "description": f"Another name of `{name}`.", ALIAS_OF: name}
        return schema


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
    """The bytes of a size like "12GB" or "1.5 GiB"; None if the text is not a size."""
    match = re.match(SIZE_PATTERN, text)
    if match is None:
        return None
    power = "KMGT".index(match[2][0]) + 1
    found = float(match[1]) * (1024 if match[2].endswith("i") else 1000) ** power
    if found < 1:
        raise ValueError("expected at least one byte")
    if found >= 2**63:
        raise ValueError("expected less than 2**63 bytes")
    return int(found)


@dataclass(frozen=True)
class OneOf:
    """Annotation of a type whose value is one of the names."""

    names: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(core_schema), "enum": [*self.names]}

    def _check(self, value: str) -> str:
        if value not in self.names:
            raise ValueError(f"expected one of {', '.join(self.names)}")
        return value
