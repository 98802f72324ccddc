"""A strict JSON parser: documents that other programs could read differently raise an error of one line."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pyqemb.errors import DataError

_MAX_DEPTH = 100
# Only such texts can contain an infinite float or an integer beyond float64; the hooks for numbers are slow.
_HUGE_NUMBER = re.compile(r"[0-9]{200}|[eE]\+?[0-9]{3}")


def parse(text: str | bytes, where: str) -> Any:
    """Parse one JSON document.

    These are errors too, besides invalid JSON (including NaN and Infinity): duplicate keys in an object, numbers that
    float64 cannot represent, nesting deeper than 100, half of a surrogate pair, bytes that are not UTF-8.

    Args:
        text: the document. A leading byte-order mark of bytes is skipped.
        where: file or file:line, for the error.

    Raises:
        DataError: "WHERE: message", with the column if it is known.

    Example:
        >>> parse('{"a": 1}', "x.json")
        {'a': 1}
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise JsonError(where, f"not UTF-8: {error.reason} at byte {error.start}", error.start + 1) from error
    if text.count("[") + text.count("{") > _MAX_DEPTH and _depth(text) > _MAX_DEPTH:
        raise JsonError(where, f"nested deeper than {_MAX_DEPTH} levels")
    hooks: dict[str, Any] = {}
    if _HUGE_NUMBER.search(text):
        hooks = {"parse_float": _finite, "parse_int": _bounded}
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant, **hooks)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        problem = f"not JSON: {error.msg}"
        raise JsonError(where, problem, error.colno, f"{problem} ({line}column {error.colno})") from error
    except _InvalidJsonError as error:
        raise JsonError(where, str(error)) from error
    except RecursionError as error:
        raise JsonError(where, "nested too deeply") from error
    if "\\u" in text and _has_surrogate(value):
        raise JsonError(where, "an escape is half of a surrogate pair", text.find("\\u") + 1)
    return value


def dumps(value: Any, indent: int | None = None) -> str:
    """Return a JSON document with null for the floats that JSON does not have: NaN and infinity.

    A character that UTF-8 does not have (half of a surrogate pair, as in the name of a file) is written as its escape.

    Example:
        >>> dumps({"a": [1.5, float("nan")]})
        '{"a": [1.5, null]}'
    """
    document = json.dumps(_without_nan(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return document.encode("utf-8", "backslashreplace").decode("utf-8")


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value


class JsonError(DataError):
    """`problem` is the message without the place; `column` counts from 1."""

    def __init__(self, where: str, problem: str, column: int = 1, shown: str | None = None):
        super().__init__(f"{where}: {shown or problem}")
        self.problem, self.column = problem, column


class _InvalidJsonError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _InvalidJsonError(f"the key {twice[:80]!r} occurs twice")
    return values


def _constant(name: str) -> Any:
    raise _InvalidJsonError(f"{name} is not a number in JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _InvalidJsonError(f"the number {digits[:20]} is too large")
    return value


def _bounded(digits: str) -> int:
    _finite(digits)
    return int(digits)


def _depth(text: str) -> int:
    """The deepest nesting; brackets inside strings do not count."""
    depth = deepest = 0
    for bracket in _brackets(text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _brackets(text: str) -> Iterable[str]:
    return (match for match in re.findall(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', text) if match[0] != '"')


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, dict):
        return any(_has_surrogate(item) for pair in value.items() for item in pair)
    return isinstance(value, list) and any(map(_has_surrogate, value))
