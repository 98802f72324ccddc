"""Weight files with changed headers: pyqemb opens what safetensors opens, except where its own rules say otherwise.

pyqemb has no parser of these headers; `Tensors` opens the file with safetensors and adds three rules. The other side of
the comparison is `safetensors.deserialize`, which takes the same bytes from memory.
"""

import importlib.util
from pathlib import Path

import pytest
import safetensors
import torch

from pyqemb.errors import CheckpointError
from pyqemb.model.checkpoint import DTYPES, Tensors, write_safetensors

spec = importlib.util.spec_from_file_location("fuzzing_mutate", Path(__file__).with_name("mutate.py"))
mutate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutate)

FAST, DEEP = 4_000, 1_000_000
FILES = (
    {"a": torch.arange(6.0).view(2, 3), "model.b": torch.ones(4).bfloat16(), "c": torch.tensor(2.0).half()},
    {"a": torch.ones(2), "model.a": torch.zeros(2)},  # one name of pyqemb twice
    {"empty": torch.ones(0, 3).double()},
)


def read_by_safetensors(data):
    """(dtype, shape, bytes) by name; None if the bytes are refused."""
    try:
        found = safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return None
    return {name: (each["dtype"], tuple(each["shape"]), bytes(each["data"])) for name, each in found}


def read_by_pyqemb(folder):
    """The same; None if the file is refused."""
    try:
        tensors = Tensors(folder, heads=())
        found = {}
        for name in tensors:
            code = next(code for code, dtype in DTYPES.items() if dtype == tensors.dtype(name))
            tensor = tensors[name]
            found[name] = code, tensors.shape(name), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return found
    except CheckpointError as error:
        return None if str(folder) in str(error) and "\n" not in str(error) else f"a bad message: {error}"


def fits_torch(shape):
    try:
        torch.empty(shape, device="meta")
    except (TypeError, RuntimeError):
        return False
    return True


def expected(theirs):
    """What pyqemb makes of the tensors that safetensors reads: it is stricter by three rules."""
    if theirs is None or any(dtype not in DTYPES for dtype, _, _ in theirs.values()):  # floating-point weights only
        return None
    if not all(fits_torch(shape) for _, shape, _ in theirs.values()):  # an empty tensor may have a dimension of 2^63
        return None
    ours = {name.removeprefix("model."): value for name, value in theirs.items()}
    return ours if len(ours) == len(theirs) else None  # names must differ without the prefix of a language model


def compare(folder, first, count):
    """Returns how many were read by both, refused by both, and refused by pyqemb's rules alone."""
    path, seeds = folder / "model.safetensors", []
    for tensors in FILES:
        write_safetensors(path, tensors)
        seeds.append(path.read_bytes())
    read = refused = stricter = 0
    for seed in range(first, first + count):
        if seed % 3:
            raw = seeds[seed % len(seeds)]
            header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
            changed = mutate.mutate(seed, [header], "json")
            data = len(changed).to_bytes(8, "little") + changed + raw[8 + len(header) :]
        else:
            data = mutate.mutate(seed, seeds)
        path.write_bytes(data)
        theirs, ours = read_by_safetensors(data), read_by_pyqemb(folder)
        assert ours == expected(theirs), (seed, theirs, ours, data)
        read += ours is not None
        refused += theirs is None
        stricter += theirs is not None and ours is None
    return read, refused, stricter


@pytest.mark.promise("R19", f"{FAST:,} changed headers: accepted and refused as by safetensors, or by a stated rule")
def test_a_changed_header_is_judged_as_by_safetensors(tmp_path):
    read, refused, stricter = compare(tmp_path, 0, FAST)
    assert min(read, refused, stricter) > FAST // 100  # each side is tested


@pytest.mark.deep
@pytest.mark.promise("R19", f"{DEEP:,} changed headers: accepted and refused as by safetensors, or by a stated rule")
def test_many_changed_headers(tmp_path):
    compare(tmp_path, FAST, DEEP)
