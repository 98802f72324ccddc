"""Checks of the arguments of public functions: the annotations of a function say what it accepts.

A value of another type is a TypeError, a value out of range a ConfigError (a ValueError), before anything of the
function runs. The error is one line that names the function, the argument, the expected and the actual value.

The arguments of the ops are tensors, which `ops.checks` checks.
"""

import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pyqemb.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])
Test = Callable[[Any], bool]
_MAX_INTEGER = 2**63
_WORDS = {
    int: "an integer", float: "a finite number", bool: "True or False", str: "text", Path: "a Path", type(None): "None"
}  # fmt: skip


@dataclass(frozen=True)
class AtLeast:
    """Annotation of a number: its minimum."""

    low: int


Count = Annotated[int, AtLeast(1)]
NotNegative = Annotated[int, AtLeast(0)]


def checked(function: F) -> F:
    """Check the arguments of every call by their annotations: types, unions, Literal, lists, dicts, `AtLeast`.

    An argument with no annotation, or with `Any`, is not checked. Of a protocol, the object needs the methods.

    Example:
        >>> @checked
        ... def repeat(text: str, times: Count = 1) -> str:
        ...     return text * times
        >>> repeat("ab", 2)
        'abab'
        >>> repeat("ab", 0)
        Traceback (most recent call last):
        pyqemb.errors.ConfigError: [repeat] times must be at least 1, got 0
    """
    name = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        check_call(function, name, *args, **options)
        return function(*args, **options)

    return typing.cast(F, call)


def check_call(function: Callable[..., Any], name: str, /, *args: Any, **options: Any) -> None:
    """Check the arguments of a call of a function, which errors call `name`, without calling it."""
    signature, hints = _hints(function)
    for key, value in signature.bind(*args, **options).arguments.items():
        if key in hints:
            check(name, key, value, hints[key])


@functools.cache  # from the first call: an annotation may name a class that is defined later
def _hints(function: Callable[..., Any]) -> tuple[inspect.Signature, dict[str, Any]]:
    signature = inspect.signature(function)
    inner: Any = inspect.unwrap(function)
    given = {key: each for key, each in inner.__annotations__.items() if key != "return"}  # it may be for type checkers
    found = typing.get_type_hints(types.SimpleNamespace(__annotations__=given), inner.__globals__, include_extras=True)
    several = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return signature, {
        key: found[key] for key, each in signature.parameters.items() if key in found and each.kind not in several
    }


def check_fields(instance: Any) -> None:
    """Check the fields of a dataclass by their annotations, in its `__post_init__`."""
    kind: Any = type(instance)
    for key, wanted in _field_hints(kind).items():
        check(kind.__name__, key, getattr(instance, key), wanted)


def check(function: str, name: str, value: Any, wanted: Any) -> None:
    """Raise an error unless the value is one that the annotation describes."""
    if _test(wanted)(value):
        return
    name, value, wanted = _innermost(name, value, wanted)
    if _test(wanted, types_only=True)(value):
        low = _minimum(wanted)
        least = f"at least {low}" if low is not None and value < low else describe(wanted)
        raise ConfigError(f"[{function}] {name} must be {least}, got {_shown(value)}")
    raise TypeError(
        f"[{function}] {name} must be {describe(wanted)}, got {_shown(value)} of type {type(value).__name__}"
    )


def describe(wanted: Any) -> str:
    """An annotation in words."""
    *others, last = dict.fromkeys(_choices(wanted))
    return f"{', '.join(others)} or {last}" if others else last


def _choices(wanted: Any) -> list[str]:
    """The alternatives of an annotation in words."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return [choice for each in inner for choice in _choices(each)]
    return [*map(repr, inner)] if origin is Literal else [_described(wanted)]


def _described(wanted: Any) -> str:
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Annotated:
        return f"{describe(inner[0])} of at least {inner[1].low}"
    if origin is tuple and inner[-1] is not ...:
        return f"({', '.join(map(describe, inner))})"
    if origin in (Sequence, list, tuple, Iterable):
        return f"a list of {describe(inner[0])}"
    if origin in (Mapping, dict):
        return f"a dict of {describe(inner[0])} to {describe(inner[1])}"
    if origin is Callable:
        return "a function"
    return _WORDS.get(wanted) or str(getattr(wanted, "__name__", "any value"))


def _minimum(wanted: Any) -> int | None:
    """The minimum that an annotation, or an alternative in it, states."""
    if typing.get_origin(wanted) is Annotated:
        return int(typing.get_args(wanted)[1].low)
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        found = (_minimum(each) for each in typing.get_args(wanted))
        return next((low for low in found if low is not None), None)
    return None


@functools.cache
def _field_hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {key: hints[key] for key in kind.__dataclass_fields__}  # type: ignore[attr-defined]


@functools.cache
def _test(wanted: Any, types_only: bool = False) -> Test:
    """Whether a value is one that the annotation describes; `types_only`: whatever its range."""
    origin = typing.get_origin(wanted)
    if origin is Literal:
        choices = typing.get_args(wanted)
        return lambda value: any(type(value) is type(each) and (types_only or value == each) for each in choices)
    if origin is Callable:
        return callable
    tests = [_test(each, types_only) for each in typing.get_args(wanted) if each is not ...] if origin else []
    if origin in (typing.Union, types.UnionType):
        return lambda value: any(test(value) for test in tests)
    if origin is Annotated:
        low = typing.get_args(wanted)[1].low
        return lambda value: tests[0](value) and (types_only or value >= low)
    if origin is tuple and ... not in typing.get_args(wanted):
        return lambda value: (
            isinstance(value, (tuple, list))
            and len(value) == len(tests)
            and all(test(item) for test, item in zip(tests, value, strict=True))
        )
    if origin in (Sequence, list, tuple):
        return lambda value: _is_list(value) and all(map(tests[0], value))
    if origin is type:
        kind: Any = typing.get_args(wanted)[0]
        kind = getattr(kind, "__bound__", kind)
        return lambda value: isinstance(value, type) and (not isinstance(kind, type) or issubclass(value, kind))
    if origin is Iterable:  # of an iterator, no item is taken
        return lambda value: (
            isinstance(value, Iterable)
            and not isinstance(value, (str, bytes, Mapping))
            and (not hasattr(value, "__len__") or all(map(tests[0], value)))
        )
    if origin in (Mapping, dict):
        return lambda value: (
            isinstance(value, origin) and all(map(tests[0], value)) and all(map(tests[1], value.values()))
        )
    return _plain_test(origin or wanted, types_only)


def _plain_test(kind: Any, types_only: bool) -> Test:
    if kind is int:
        return lambda value: _is_number(value, Integral) and (types_only or abs(value) < _MAX_INTEGER)
    if kind is float:
        return lambda value: _is_number(value, Real) and (types_only or _is_finite(value))
    if kind is Path:
        return lambda value: isinstance(value, os.PathLike) and isinstance(os.fspath(value), str)
    if kind is Any or not isinstance(kind, type) or (getattr(kind, "_is_protocol", False) and not _is_runtime(kind)):
        return lambda value: True
    return lambda value: isinstance(value, kind)


def _is_runtime(protocol: type) -> bool:
    """Whether isinstance can tell which objects implement a protocol."""
    return getattr(protocol, "_is_runtime_protocol", False)


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _is_list(value: Any) -> bool:
    """Whether a value is a list or like one: a tuple, an array, a column of a table."""
    return (
        hasattr(value, "__len__")
        and hasattr(value, "__getitem__")
        and not isinstance(value, (str, bytes, bytearray, Mapping))
        and getattr(value, "ndim", 1) > 0
    )


def _innermost(name: str, value: Any, wanted: Any) -> tuple[str, Any, Any]:
    """The first item of a list that does not fit, with its place; the value itself if it is no list."""
    for each in typing.get_args(wanted) if typing.get_origin(wanted) in (typing.Union, types.UnionType) else (wanted,):
        if typing.get_origin(each) in (Sequence, list, Iterable) and isinstance(value, (list, tuple)):
            item = typing.get_args(each)[0]
            for index, one in enumerate(value):
                if not _test(item)(one):
                    return _innermost(f"{name}[{index}]", one, item)
    return name, value, wanted


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= _MAX_INTEGER:
        return f"an integer of {value.bit_length()} bits"
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:100]} ..."
