"""Broken calls: a valid call of a function, drawn by a seed, with one argument replaced by one that breaks a rule.

What breaks a rule follows from the annotation of the argument, and from the further values of a record. A broken call
must raise an error that names the argument, change none of its inputs, and write no file.
"""

import inspect
import itertools
import math
import os
import re
import types
import typing
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

import jsonschema
import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from pyqemb.data.settings_keys import ALIAS_OF, json_schema
from pyqemb.errors import MachineError

ERRORS = (TypeError, ValueError, IndexError)
EACH_DRAW = 25  # broken calls beside one draw of the other arguments
HUGE = 10**400
POOL = (
    None, True, False, 0, 1, -1, 3, 2**70, HUGE, 0.5, -0.5, math.nan, math.inf, -math.inf, 1j, "", "text", "\0",
    b"bytes", [], [None], ["a", 5], [1.5], [0], [-1], [math.nan], [[]], (), ("a", "b", "c"), {}, {"a": 5}, {5: "a"},
    {"a": None}, {"a": {}}, {5, 6}, object(), np.zeros(3), np.zeros((2, 2)), np.array(["a", 5], dtype=object),
    torch.zeros(2), torch.zeros(2, 2), lambda: None, Path("/nowhere/at-all"), int, range(3), NotImplemented,
)  # fmt: skip
PLAIN = (type(None), bool, int, float, str, list, dict)


@dataclass(frozen=True)
class Named:
    """A broken value, and what its error names instead of the argument."""

    value: Any
    pattern: str


@dataclass
class Record:
    """A function, its valid calls and what breaks them.

    call: called with keyword arguments.
    make: the arguments of a valid call, drawn by a generator.
    extra: by argument, broken values that the annotation allows; also a function of the valid arguments.
    fine: by argument, values of POOL that are accepted all the same: a list of them, or a function.
    names: by argument, the regular expression of its name in messages.
    free: arguments of which any value is accepted, with the reason.
    target: the name of the function, if `call` does not lead to it.
    cheap: whether the valid call runs for every draw; otherwise once at the end.
    """

    call: Callable[..., Any]
    make: Callable[[Random], dict[str, Any]]
    extra: Mapping[str, Any] = field(default_factory=dict)
    fine: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    free: Mapping[str, str] = field(default_factory=dict)
    cheap: bool = True
    target: str = ""

    def parameters(self) -> list[str]:
        kinds = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
        return [name for name, each in inspect.signature(self.call).parameters.items() if each.kind not in kinds]

    def hints(self) -> dict[str, Any]:
        function: Any = inspect.unwrap(self.call)
        if inspect.isclass(function):
            function = inspect.unwrap(function.__init__)
        elif not (inspect.isfunction(function) or inspect.ismethod(function)):
            function = type(function).__call__
        given = {key: each for key, each in function.__annotations__.items() if key != "return"}
        names = types.SimpleNamespace(__annotations__=given)
        try:
            return typing.get_type_hints(names, function.__globals__, include_extras=True)
        except NameError:  # a name that only type checkers import; the record lists the values
            return {}

    def pattern(self, name: str) -> str:
        return self.names.get(name, rf"\b{re.escape(re.sub(r'_[A-Z0-9]+$', '', name))}")

    def accepted(self, name: str, value: Any) -> bool:
        fine = self.fine.get(name, ())
        return fine(value) if callable(fine) else any(type(value) is type(each) and value == each for each in fine)

    def broken(self, arguments: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
        """(argument, value, what the error must name) of all broken calls beside these arguments."""
        found, hints = [], self.hints()
        for name in self.parameters():
            if name in self.free:
                continue
            values = [value for value in POOL if not fits(value, hints.get(name, Any))]
            more = self.extra.get(name, ())
            values += more(arguments) if callable(more) else more
            for value in values:
                value, pattern = (
                    (value.value, value.pattern) if isinstance(value, Named) else (value, self.pattern(name))
                )
                if not self.accepted(name, value):
                    found.append((name, value, pattern))
        return found


def fits(value: Any, wanted: Any) -> bool:
    """Whether a value may be an argument with this annotation."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any or isinstance(wanted, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if origin is Annotated:
        return fits(value, inner[0]) and value >= inner[1].low
    if wanted is float:
        return (type(value) is float and math.isfinite(value)) or (type(value) is int and value != HUGE)
    if wanted is int:
        return type(value) is int and abs(value) < 2**63
    if origin in (list, tuple, Sequence, Iterable):
        if (
            isinstance(value, str | bytes | Mapping | Tensor)
            or not hasattr(value, "__iter__")
            or isinstance(value, type)
        ):
            return False
        if origin is not Iterable and not hasattr(value, "__getitem__"):
            return False
        if origin is tuple and ... not in inner:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return all(fits(item, inner[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if origin is Callable:
        return callable(value)
    if getattr(wanted, "_is_protocol", False):
        return False  # nothing of the pool is a model
    return isinstance(value, origin or wanted)


def settings_record(
    kind: type[BaseModel], base: dict[str, Any], free: Sequence[str] = (), paths: Sequence[str] = ()
) -> Record:
    """The record of a class of settings: its JSON Schema says which values are broken.

    `paths`: texts that may be given as a Path, too.
    """
    schema = json_schema(kind)
    properties, definitions = schema["properties"], schema.get("$defs", {})

    def broken(name: str) -> list[Any]:
        validator = jsonschema.Draft202012Validator({**properties[name], "$defs": definitions})
        if not properties[name].keys() - {"description", "title", "examples", "default"}:
            return []
        values = []
        for value in POOL:
            if isinstance(value, tuple):
                continue
            if isinstance(value, Path) and (name in paths or properties[name].get("format") == "path"):
                continue
            plain = _is_plain(value) and not (isinstance(value, float) and not math.isfinite(value))
            if not plain or not validator.is_valid(value) or (type(value) is int and abs(value) >= 2**63):
                values.append(value)
        return values

    def make(r: Random) -> dict[str, Any]:
        drawn = dict(base)
        for name, given in properties.items():
            if given.get("examples") and name not in base and ALIAS_OF not in given and r.random() < 0.3:
                candidate = {**drawn, name: given["examples"][0]}
                try:
                    kind(**candidate)
                except ValueError:
                    continue
                drawn = candidate
        return drawn

    names = {name: rf"\b{given[ALIAS_OF]}\b" for name, given in properties.items() if ALIAS_OF in given}

    class Settings(Record):
        def parameters(self) -> list[str]:
            return list(properties)

        def hints(self) -> dict[str, Any]:
            return {}

    unchecked = {name: "any value" for name in properties if name in free or not broken(name)}
    extra = {name: broken(name) for name in properties if name not in unchecked}

    def call(**values: Any) -> Any:
        for name, given in properties.items():  # a key and its other name exclude each other
            if name in values and given.get(ALIAS_OF) in values:
                values.pop(given[ALIAS_OF])
        return kind(**values)

    target = f"{kind.__module__.removeprefix('pyqemb.')}.{kind.__qualname__}"
    return Settings(call, make, extra, names=names, free=unchecked, target=target)


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    if type(value) is list:
        return all(map(_is_plain, value))
    return type(value) in PLAIN and not (isinstance(value, float) and not math.isfinite(value))


def printed(value: Any) -> Any:
    """Something to compare what an input holds by."""
    if isinstance(value, Tensor):
        plain = value.device.type == "cpu" and type(value) is Tensor and value.layout is torch.strided
        if not plain:
            return value._version if type(value) is Tensor else id(value)
        raw = value.detach().contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return tuple(value.shape), value.dtype, value.requires_grad, zlib.crc32(raw)
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype, repr(value) if value.dtype == object else zlib.crc32(value.tobytes())
    if isinstance(value, nn.Module):
        tensors = [*value.parameters(), *value.buffers()]
        own = {
            key: repr(each) for key, each in vars(value).items() if isinstance(each, str | int | float | dict | tuple)
        }
        return value.training, own, [(x._version, x.dtype, x.device, x.requires_grad) for x in tensors]
    if isinstance(value, Mapping) and not isinstance(value, nn.Module):
        return [(key, printed(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [printed(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return [printed(getattr(value, name)) for name in value.__dataclass_fields__]
    return repr(value)


def listing(folder: str | Path) -> list[Any]:
    """The files and folders in a folder, with sizes and times."""
    found: list[Any] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                found += [entry.path, listing(entry.path)]
            else:
                status = entry.stat(follow_symlinks=False)
                found.append((entry.path, status.st_size, status.st_mtime_ns))
    return found


def run(record: Record, calls: int, seed: int, watched: Path | None = None) -> tuple[int, list[str]]:
    """Make broken calls; returns (their number, what went wrong)."""
    wrong: list[str] = []
    done = 0
    for draw in itertools.count():
        r = Random(f"{seed} {draw}")
        arguments = record.make(r)
        if record.cheap:
            record.call(**record.make(Random(f"{seed} {draw}")))
        broken = record.broken(arguments)
        r.shuffle(broken)
        files = listing(watched) if watched else None
        before = {key: printed(x) for key, x in arguments.items()}
        for name, value, pattern in broken[: min(EACH_DRAW, calls - done)]:
            done += 1
            problem = one(record, {**arguments, name: value}, name, pattern)
            if problem:
                wrong.append(f"{name}={_short(value)}: {problem}")
            if before != {key: printed(x) for key, x in arguments.items()}:
                wrong.append(f"{name}={_short(value)}: changes an input")
                arguments = record.make(Random(f"{seed} {draw}"))
                before = {key: printed(x) for key, x in arguments.items()}
            if watched and files != (files := listing(watched)):
                wrong.append(f"{name}={_short(value)}: writes a file")
        if not broken or done >= calls:
            break
    record.call(**record.make(Random(f"{seed} end")))
    return done, wrong


def one(record: Record, arguments: dict[str, Any], name: str, pattern: str) -> str | None:
    """What is wrong with the answer to a broken call; None: nothing."""
    try:
        record.call(**arguments)
    except (*ERRORS, FileNotFoundError, MachineError) as error:
        if re.search(pattern, str(error)) is None:
            return f"not named: {type(error).__name__}: {str(error)[:200]}"
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "accepted"


def _short(value: Any) -> str:
    return f"{type(value).__name__} " + " ".join(repr(value).split())[:50]
