"""The keys of a settings class with type, default, description and example, as its JSON Schema states them."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

ALIAS_OF = "x-alias-of"  # in the schema of a key that is another name of a key
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Key:
    """A key of a settings file.

    Attributes:
        name: the name with those of its tables, e.g. "train.learning_rate".
        type: the type of its values, in words.
        default: its default as TOML; "not set" if it is null, None if the key is required.
        description: what the key does, then what its values mean.
        example: a value as TOML; None without one.
        aliases: other names of the key.
    """

    name: str
    type: str
    default: str | None
    description: str
    example: str | None
    aliases: tuple[str, ...]

    @property
    def last(self) -> str:
        """The name without those of the tables."""
        return self.name.rpartition(".")[2]

    @property
    def summary(self) -> str:
        """The first sentence of the description."""
        return first_sentence(self.description)


@dataclass(frozen=True)
class Table:
    """A table of a settings file.

    Attributes:
        name: the name, e.g. "train"; "" for the keys outside of tables.
        header: the header in TOML, e.g. "[train]" or "[[data]]"; "" for the keys outside of tables.
        kind: the value of `kind` that selects this one among the tables of a name; None if there is only one.
        description: the description of the class of its settings.
        keys: the keys, without those that are separate tables.
    """

    name: str
    header: str
    kind: str | None
    description: str
    keys: tuple[Key, ...]


class _Untitled(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # a title like "Learning Rate" only repeats learning_rate


def json_schema(settings: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON Schema of a settings class, for editors and validators.

    Example:
        >>> from pyqemb.training import TrainConfig
        >>> json_schema(TrainConfig)["required"]
        ['model', 'data']
    """
    schema = settings.model_json_schema(schema_generator=_Untitled)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}


def tables(settings: type[BaseModel]) -> list[Table]:
    """Return the tables of a settings class, in the order of its fields; the keys outside of tables come first."""
    schema = json_schema(settings)
    return list(_tables(schema, schema.get("$defs", {}), "", ""))


def first_sentence(text: str) -> str:
    """The text up to its first period before a space or a line end."""
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def as_toml(value: Any) -> str:
    """A value (strings, numbers, booleans, lists, tables) as TOML, in one line."""
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{_bare(key)} = {as_toml(item)}" for key, item in value.items()) + " }" if value else "{}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, float):
        return re.sub(r"e([+-])0+", r"e\1", repr(value))
    return json.dumps(value, ensure_ascii=False)


def _bare(key: str) -> str:
    return key if re.fullmatch(r"[\w-]+", key, flags=re.ASCII) else json.dumps(key, ensure_ascii=False)


def _tables(schema: _Schema, definitions: _Schema, name: str, header: str) -> Iterator[Table]:
    properties: _Schema = schema.get("properties", {})
    kind = properties.get("kind", {}).get("const")
    keys, inner = [], []
    for last, given in properties.items():
        full = f"{name}.{last}".removeprefix(".")
        nested = list(_nested(given, f"[{full}]"))
        inner += [(definitions[reference], full, head) for reference, head in nested]
        if ALIAS_OF not in given and ("description" in given or not nested) and not (kind and last == "kind"):
            aliases = tuple(alias for alias, other in properties.items() if other.get(ALIAS_OF) == last)
            keys.append(_key(full, given, last in schema.get("required", ()), aliases))
    if keys or kind:
        yield Table(name, header, kind, schema.get("description", ""), tuple(keys))
    for definition, full, head in inner:
        yield from _tables(definition, definitions, full, head)


def _nested(schema: _Schema, header: str) -> Iterator[tuple[str, str]]:
    """The definitions of the tables in a value, each with its header."""
    if "$ref" in schema:
        yield schema["$ref"].rpartition("/")[2], header
    for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from _nested(part, header)
    if isinstance(schema.get("items"), Mapping):
        yield from _nested(schema["items"], f"[{header}]")
    if isinstance(schema.get("additionalProperties"), Mapping):
        yield from _nested(schema["additionalProperties"], f"{header[:-1]}.NAME]")


def _key(name: str, schema: _Schema, required: bool, aliases: tuple[str, ...]) -> Key:
    default = schema.get("default")
    return Key(
        name=name,
        type=_type(schema),
        default=None if required else "not set" if default is None else as_toml(default),
        description=schema.get("description", ""),
        example=as_toml(schema["examples"][0]) if schema.get("examples") else None,
        aliases=aliases,
    )


def _type(schema: _Schema) -> str:
    """The type of a value in words: "number > 0", "list of strings"."""
    if "$ref" in schema:
        return "table"
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(filter(None, map(_type, options))))
    if "enum" in schema or "const" in schema:
        return " or ".join(as_toml(value) for value in schema.get("enum", [schema.get("const")]) if value is not None)
    kind = schema.get("type")
    if kind == "array":
        count = f"{len(schema['prefixItems'])} " if "prefixItems" in schema else ""
        return f"list of {count}{_several(_type(schema.get('items') or schema['prefixItems'][0]))}"
    if kind == "object":
        item = schema.get("additionalProperties")
        return f"table of {_several(_type(item))}" if isinstance(item, Mapping) else "table"
    bounds = ", ".join(f"{sign} {as_toml(schema[bound])}" for bound, sign in _BOUNDS.items() if bound in schema)
    name = {"boolean": "true or false", "null": "", None: "any value"}.get(kind, schema.get("format", kind))
    return f"{name} {bounds}".strip()


def _several(name: str) -> str:
    return re.sub(r"^(integer|number|string|path|table)\b", r"\1s", name)
