"""Settings from TOML, YAML or JSON files: unknown keys are errors, and every error is one line."""

import datetime
import math
import typing
from collections.abc import Callable, Mapping
from numbers import Number
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from pyqemb.data import strict_json
from pyqemb.data.arguments import checked
from pyqemb.data.machine import unreadable
from pyqemb.errors import ConfigError, DataError

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib  # type: ignore[no-redef]

S = TypeVar("S", bound="Settings")
_MAX_BYTES = 1 << 20
_MAX_DEPTH = 20
_MAX_VALUES = 100_000
_MAX_INTEGER = 2**63
_WRONG_VALUE: Final = "wrong_value"
_MISSING: Final = "missing_key"


class StrictModel(BaseModel):
    """Rejects unknown keys, NaN, and values that pydantic would convert: true to a number, "yes" to true, bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _types_are_types(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, Mapping) else ():
            known = cls.model_fields.get(name)
            if known is not None and (wanted := _unconverted(value, _kinds(known.annotation))):
                raise wrong_value(f"expected {wanted}", name, value)
        return values


class Settings(StrictModel):
    """Frozen settings. ConfigError names the missing, unknown or invalid key, and the value."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain_all(error, explain)) from error

    @classmethod
    @checked
    def from_file(cls: type[S], path: str | Path, overrides: Mapping[str, Any] | None = None) -> S:
        """Read a file; `overrides` replace its top-level keys. Paths in it are relative to the working directory."""
        values = read_settings(path)
        try:
            return cls(**{**values, **(overrides or {})})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def read_settings(path: str | Path, change: Callable[[dict[str, Any]], None] = lambda values: None) -> dict[str, Any]:
    """Return the values of a .toml, .yaml, .yml or .json file, after `change`.

    All values are strings, numbers, booleans, lists or tables.

    Raises a ConfigError that names the file, and the invalid place or key.
    """
    path = Path(path)
    if path.suffix not in (".toml", ".yaml", ".yml", ".json"):
        raise ConfigError(f"{path}: expected a .toml, .yaml or .json file")
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_BYTES >> 20} MiB")
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise unreadable(path, error, ConfigError) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    try:
        if path.suffix == ".toml":
            values = tomllib.loads(text)
        else:
            values = strict_json.parse(text, str(path)) if path.suffix == ".json" else parse_yaml(text)
        if not isinstance(values, dict):
            raise ConfigError("expected sections such as model, data, train")
        check_plain(values)
    except DataError as error:
        raise ConfigError(str(error)) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply") from error
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from error
    change(values)
    return values


def parse_yaml(text: str) -> Any:
    """Parse one YAML document. ValueError with a message of one line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(_one_line(error)) from error


def check_plain(values: Any) -> None:
    """ValueError for a value that no setting can have, with its key, and for recursive values."""
    count = 0
    waiting: list[tuple[tuple[str, ...], Any]] = [((), values)]
    while waiting:
        where, value = waiting.pop()
        count += 1
        name = ".".join(where)
        if count > _MAX_VALUES or len(where) > _MAX_DEPTH:
            raise ValueError(
                f"{'.'.join(where[:3])}: nested deeper than {_MAX_DEPTH} levels, or more than {_MAX_VALUES} values"
            )
        if isinstance(value, dict):
            for key, item in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"{name or 'configuration'}: the key {key!r} is not text; put it in quotes")
                waiting.append(((*where, key), item))
        elif isinstance(value, list):
            waiting += [((*where, str(number)), item) for number, item in enumerate(value)]
        elif isinstance(value, (datetime.date, datetime.time)):
            raise ValueError(f"{name}: {value} is a date or a time; put it in quotes")
        elif isinstance(value, int) and abs(value) >= _MAX_INTEGER:
            raise ValueError(f"{name}: {_shown(value)} has more than 64 bits")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}")
        elif not (value is None or isinstance(value, (str, int, float))):
            raise ValueError(
                f"{name}: expected text, a number, true or false, a list or a table, got {type(value).__name__}"
            )


_WANTED = {  # in place of pydantic's messages that name types of Python; the values are those of the error
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "dict_type": "expected a table",
    "model_type": "expected a table",
    "too_short": "expected at least {min_length}, has {actual_length}",
}


def explain_all(error: ValidationError, one: Callable[[Any], str]) -> str:
    """The errors of the innermost keys, formatted by `one`, in one line.

    The length of a list is not an error if one of its items is invalid.
    """
    found = error.errors()
    inner = [each for each in found if not any(_is_inside(other["loc"], each["loc"]) for other in found)]
    return "; ".join(map(one, inner))


def _is_inside(key: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(key) > len(other) and key[: len(other)] == other


def explain(error: Any) -> str:
    """Format one pydantic error for the user."""
    where = ".".join(str(part) for part in error["loc"]) or "configuration"
    if error["type"] in ("missing", "extra_forbidden"):
        return f"{where}: {'missing' if error['type'] == 'missing' else 'unknown key'}"
    value, own = error["input"], error.get("ctx", {})
    if error["type"] in (_WRONG_VALUE, _MISSING):  # raised by the section, which pydantic reports as the invalid value
        where, value = f"{where}.{own['key']}" if error["loc"] else own["key"], own.get("value")
    if error["type"] == _MISSING:
        return f"{where}: missing"
    message = _WANTED[error["type"]].format(**own) if error["type"] in _WANTED else error["msg"]
    message = message.removeprefix("Value error, ").removeprefix(f"{own.get('key')}: ")
    return f"{where}: {message[:1].lower()}{message[1:]}, got {_shown(value)}"


def missing(key: str) -> PydanticCustomError:
    """The error of a section without a key that is required only in some cases."""
    return PydanticCustomError(_MISSING, "{key}: missing", {"key": key})


def wrong_value(wanted: str, key: str, value: Any) -> PydanticCustomError:
    """The error of a section that names the key and its value, for a rule about several keys."""
    return PydanticCustomError(_WRONG_VALUE, f"{{key}}: {wanted}", {"key": key, "value": value})


class _Loader(yaml.SafeLoader):
    """Rejects duplicate keys, which would silently hide the first value, and unbounded merges."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else id(key)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} appears twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > 1000:
            raise yaml.constructor.ConstructorError(None, None, "more than 1000 keys in a mapping", node.start_mark)


def _unconverted(value: Any, kinds: set[Any]) -> str | None:
    """What is expected instead of a value that pydantic would convert to one of the types; None: it need not."""
    sections = any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds)
    if Any not in kinds and not _is_plain(value, sections):
        return "text, a number, true or false, a list or a table with names as keys"
    if kinds & {int, float}:
        if bool not in kinds and _any(value, lambda item: isinstance(item, bool)):
            return "a number"
        if _any(value, lambda item: isinstance(item, int) and abs(item) >= _MAX_INTEGER):
            return "a number of at most 64 bits"
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else [value]
    if bool in kinds and not kinds & {int, float} and any(type(item) in (int, float) for item in items):
        return "true or false, not a number"
    if kinds <= {bool, type(None)} and not isinstance(value, bool | None):
        return "true or false"
    if kinds & {str, Path} and _any(value, lambda item: isinstance(item, bytes)):
        return "text"
    return None


def _kinds(annotation: Any) -> set[Any]:
    """The types in an annotation; for a Literal those of its values."""
    if typing.get_origin(annotation) is Literal:
        return {type(value) for value in typing.get_args(annotation)}
    found = {kind for part in typing.get_args(annotation) for kind in _kinds(part)}
    return found or {annotation if isinstance(annotation, type) else None}


def _is_plain(value: Any, sections: bool) -> bool:
    """Whether a value is what a file of settings may hold, or a section; an array is not.

    `sections`: tables in it are sections, which check their own values.
    """
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and (sections or _is_plain(item, sections)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item, sections) for item in value)
    return value is None or isinstance(value, (str, bytes, Number, Path, BaseModel))


def _any(value: Any, test: Callable[[Any], bool]) -> bool:
    """Whether a value, or one inside lists and dictionaries, passes the test."""
    if isinstance(value, Mapping):
        return any(_any(item, test) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_any(item, test) for item in value)
    return test(value)


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= _MAX_INTEGER:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value) if not isinstance(value, float) or math.isfinite(value) else str(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
