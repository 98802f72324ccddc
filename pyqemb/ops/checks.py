"""Argument checks of the public functions.

An error is one line that names the argument, the expected value and the actual value.

The native code checks what is cheaper to check there (shapes, dtypes, devices, the values of cu_seqlens), with the same
messages.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

_NO_DISPATCH = Tensor.__torch_dispatch__
_stands_for: str | None = None


@contextmanager
def shapes_only(device: str) -> Iterator[None]:
    """Context in which the ops take meta tensors, and return and save for backward the same shapes as on `device`.

    `device` is "cpu" or "cuda", which need not exist. As in a compiled graph, values are not checked.
    """
    global _stands_for
    before, _stands_for = _stands_for, device
    try:
        yield
    finally:
        _stands_for = before


def has_no_values() -> bool:
    """Whether an op is called for shapes alone: inside a compiled graph, or in `shapes_only`."""
    return torch.compiler.is_compiling() or _stands_for is not None


def device_type(x: Tensor) -> str:
    """The type of a tensor's device; in `shapes_only` that of the device that the meta device replaces."""
    return _stands_for or x.device.type


def tensor(op: str, name: str, value: Any) -> Tensor:
    """Check a tensor whose memory the kernels can read.

    It must be strided, on the CPU or on a CUDA device, and not a wrapper of another tensor.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"[{op}] {name} must be a torch.Tensor, got {type(value).__name__}")
    if has_no_values():
        return value
    if type(value).__torch_dispatch__ is not _NO_DISPATCH:
        raise TypeError(f"[{op}] {name} must be a plain torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"[{op}] {name} must be a dense tensor, got layout {value.layout}")
    if not (value.is_cpu or value.is_cuda):
        raise ValueError(f"[{op}] {name} must be on the CPU or on a CUDA device, got {value.device}")
    return value.resolve_neg() if value.is_neg() else value


def optional_tensor(op: str, name: str, value: Any) -> Tensor | None:
    """Check an argument that is a tensor or None."""
    return None if value is None else tensor(op, name, value)


def on_device_of(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Check that two tensors are on one device."""
    if value.device != other.device:
        raise ValueError(f"[{op}] {name} must be on the device of {other_name}, {other.device}, got {value.device}")


def number(op: str, name: str, value: Any) -> float:
    """Check a real number that is not a bool."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"[{op}] {name} must be a number, got {value!r:.100} of type {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"[{op}] {name} must be finite, got an integer that no float holds") from None


def finite(op: str, name: str, value: Any) -> float:
    """Check a real number that is neither NaN nor infinite."""
    result = number(op, name, value)
    if not math.isfinite(result):
        raise ValueError(f"[{op}] {name} must be finite, got {result}")
    return result


def positive(op: str, name: str, value: Any) -> float:
    """Check a finite number above 0."""
    result = number(op, name, value)
    if not (math.isfinite(result) and result > 0):
        raise ValueError(f"[{op}] {name} must be positive and finite, got {result}")
    return result


def not_negative(op: str, name: str, value: Any) -> float:
    """Check a finite number of at least 0."""
    result = finite(op, name, value)
    if result < 0:
        raise ValueError(f"[{op}] {name} must not be negative, got {result}")
    return result


def integer(op: str, name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """Check an integer that is not a bool, of at least `low` and at most `high`."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt | Integral):
        raise TypeError(f"[{op}] {name} must be an integer, got {value!r:.100} of type {type(value).__name__}")
    whole: int = value if isinstance(value, int | torch.SymInt) else int(value)  # type: ignore[assignment]
    if low is not None and whole < low:
        raise ValueError(f"[{op}] {name} must be at least {low}, got {whole}")
    if high is not None and whole > high:
        raise ValueError(f"[{op}] {name} must be at most {high}, got a larger integer")
    return whole


def flag(op: str, name: str, value: Any) -> bool:
    """Check a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"[{op}] {name} must be True or False, got {value!r:.100} of type {type(value).__name__}")
    return value


def choice(op: str, name: str, value: Any, choices: Sequence[str]) -> None:
    """Check that a string is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        listed = " or ".join(map(repr, choices))
        raise ValueError(f"[{op}] {name} must be {listed}, got {value!r:.100}")


def items(op: str, name: str, value: Any, of: str) -> list[Any]:
    """The items of a list, a tuple or another sequence that is neither a string nor a mapping."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
        raise TypeError(f"[{op}] {name} must be a list of {of}, got {type(value).__name__}")
    return list(value)


def device(op: str, name: str, value: Any) -> torch.device:
    """Check a torch.device or its name."""
    try:
        return torch.device(value)
    except (TypeError, RuntimeError):
        raise ValueError(f"[{op}] {name} must be a torch.device or its name, got {value!r:.100}") from None
