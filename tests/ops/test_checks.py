"""The argument checks: what each returns, and the exact message of each error."""

import math
from contextlib import suppress
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyqemb.ops import checks
from pyqemb.ops.checks import shapes_only

HUGE = 10**400


def message(error, call, *args, **options):
    with pytest.raises(error) as caught:
        call("op", "x", *args, **options)
    return str(caught.value)


def test_tensor():
    x = torch.ones(2)
    assert checks.tensor("op", "x", x) is x
    assert checks.optional_tensor("op", "x", x) is x
    assert checks.optional_tensor("op", "x", None) is None
    parameter = torch.nn.Parameter(x)
    assert checks.tensor("op", "x", parameter) is parameter


@pytest.mark.parametrize("check", [checks.tensor, checks.optional_tensor])
def test_tensor_refuses(check):
    assert message(TypeError, check, [1.0]) == "[op] x must be a torch.Tensor, got list"
    assert message(TypeError, check, torch.ones(2, 2).to_sparse()) == (
        "[op] x must be a dense tensor, got layout torch.sparse_coo"
    )
    assert message(ValueError, check, torch.ones(2, device="meta")) == (
        "[op] x must be on the CPU or on a CUDA device, got meta"
    )
    with FakeTensorMode():
        fake = torch.ones(2)
    assert message(TypeError, check, fake) == "[op] x must be a plain torch.Tensor, got FakeTensor"


def test_a_lazy_negation_is_computed():
    x = torch.tensor([1 + 2j]).conj().imag
    assert x.is_neg()
    found = checks.tensor("op", "x", x)
    assert not found.is_neg()
    assert found.tolist() == [-2.0]


def test_shapes_only():
    x = torch.ones(2, device="meta")
    assert not checks.has_no_values()
    assert checks.device_type(x) == "meta"
    with shapes_only("cuda"):
        assert checks.has_no_values()
        assert checks.device_type(x) == "cuda"
        assert checks.tensor("op", "x", x) is x
        assert message(TypeError, checks.tensor, 3) == "[op] x must be a torch.Tensor, got int"
        with suppress(KeyError), shapes_only("cpu"):
            assert checks.device_type(x) == "cpu"
            raise KeyError
        assert checks.device_type(x) == "cuda"
    assert not checks.has_no_values()
    assert checks.device_type(torch.ones(1)) == "cpu"


def test_on_device_of():
    x, other = torch.ones(1), torch.ones(1, device="meta")
    checks.on_device_of("op", "x", x, "y", torch.zeros(2))
    with pytest.raises(ValueError, match=r"^\[op\] x must be on the device of y, meta, got cpu$"):
        checks.on_device_of("op", "x", x, "y", other)


@pytest.mark.parametrize("check", [checks.number, checks.finite, checks.positive, checks.not_negative])
def test_numbers(check):
    for value in (2, 2.0, np.float32(2), np.int64(2), Fraction(2)):
        found = check("op", "x", value)
        assert type(found) is float
        assert found == 2
    assert message(TypeError, check, True) == "[op] x must be a number, got True of type bool"
    assert message(TypeError, check, "1") == "[op] x must be a number, got '1' of type str"
    assert message(TypeError, check, "a" * 200) == f"[op] x must be a number, got '{'a' * 99} of type str"
    assert message(TypeError, check, torch.ones(1)) == "[op] x must be a number, got tensor([1.]) of type Tensor"
    assert message(ValueError, check, HUGE) == "[op] x must be finite, got an integer that no float holds"


def test_limits_of_numbers():
    assert math.isnan(checks.number("op", "x", math.nan))
    assert checks.number("op", "x", -math.inf) == -math.inf
    assert checks.finite("op", "x", -1e308) == -1e308
    assert checks.not_negative("op", "x", 0) == 0
    assert checks.positive("op", "x", 5e-324) == 5e-324
    for bad in (math.nan, math.inf, -math.inf):
        assert message(ValueError, checks.finite, bad) == f"[op] x must be finite, got {bad}"
        assert message(ValueError, checks.positive, bad) == f"[op] x must be positive and finite, got {bad}"
        assert message(ValueError, checks.not_negative, bad) == f"[op] x must be finite, got {bad}"
    assert message(ValueError, checks.positive, 0) == "[op] x must be positive and finite, got 0.0"
    assert message(ValueError, checks.positive, -1) == "[op] x must be positive and finite, got -1.0"
    assert message(ValueError, checks.not_negative, -5e-324) == "[op] x must not be negative, got -5e-324"


def test_integer():
    for value in (3, np.int64(3), np.uint8(3)):
        found = checks.integer("op", "x", value)
        assert type(found) is int
        assert found == 3
    assert checks.integer("op", "x", -HUGE) == -HUGE
    assert checks.integer("op", "x", 2, low=2, high=2) == 2
    assert message(ValueError, checks.integer, 1, low=2) == "[op] x must be at least 2, got 1"
    assert message(ValueError, checks.integer, -1, low=0) == "[op] x must be at least 0, got -1"
    assert message(ValueError, checks.integer, 3, high=2) == "[op] x must be at most 2, got a larger integer"
    assert message(ValueError, checks.integer, HUGE, high=0) == "[op] x must be at most 0, got a larger integer"
    for bad, shown in ((True, "True of type bool"), (2.0, "2.0 of type float"), ("2", "'2' of type str")):
        assert message(TypeError, checks.integer, bad) == f"[op] x must be an integer, got {shown}"
    assert message(TypeError, checks.integer, "a" * 200) == f"[op] x must be an integer, got '{'a' * 99} of type str"


def test_flag():
    assert checks.flag("op", "x", True) is True
    assert checks.flag("op", "x", False) is False
    assert message(TypeError, checks.flag, 1) == "[op] x must be True or False, got 1 of type int"
    assert message(TypeError, checks.flag, "a" * 200) == f"[op] x must be True or False, got '{'a' * 99} of type str"


def test_choice():
    checks.choice("op", "x", "b", ["a", "b"])
    assert message(ValueError, checks.choice, "c", ["a", "b"]) == "[op] x must be 'a' or 'b', got 'c'"
    assert message(ValueError, checks.choice, 1, (1, "a")) == "[op] x must be 1 or 'a', got 1"
    assert message(ValueError, checks.choice, "c" * 200, ["a"]) == f"[op] x must be 'a', got '{'c' * 99}"


def test_items():
    assert checks.items("op", "x", (1, 2), "numbers") == [1, 2]
    given = [1]
    assert checks.items("op", "x", given, "numbers") is not given
    assert checks.items("op", "x", range(2), "numbers") == [0, 1]
    for bad in ("ab", b"ab", bytearray(b"ab"), {1: 2}, {1}, 3):
        assert message(TypeError, checks.items, bad, "numbers") == (
            f"[op] x must be a list of numbers, got {type(bad).__name__}"
        )


def test_device():
    assert checks.device("op", "x", "cpu") == torch.device("cpu")
    assert checks.device("op", "x", torch.device("cuda", 1)) == torch.device("cuda:1")
    for bad in ("gpu", 3.5):
        assert message(ValueError, checks.device, bad) == (f"[op] x must be a torch.device or its name, got {bad!r}")
    assert message(ValueError, checks.device, "a" * 200) == (
        f"[op] x must be a torch.device or its name, got '{'a' * 99}"
    )
