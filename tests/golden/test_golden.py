"""The golden vectors: the numbers of three tiny models stay what they were, or the changelog says that they moved."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyqemb import _C

spec = importlib.util.spec_from_file_location("golden", Path(__file__).with_name("make.py"))
golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(golden)

STORED = json.loads(golden.STORE.read_text(encoding="utf-8"))
WHAT_TO_DO = (
    "Without a reason this is a fault. With one: run `python tests/golden/make.py`, and describe the change in "
    "CHANGELOG.md under Changed, with the digest that it prints."
)


@pytest.mark.parametrize("name", golden.FORMS)
def test_the_values_have_not_moved(name):
    moved = golden.moved(STORED["values"][name], golden.values_of(name))
    assert not moved, f"{len(moved)} golden values of {name!r} moved:\n" + "\n".join(moved[:8]) + f"\n{WHAT_TO_DO}"


def test_the_forms_are_those_that_are_stored():
    assert STORED["values"].keys() == golden.FORMS.keys()
    assert sum(1 for _ in golden.leaves(STORED["values"])) > 1500
    assert all(values["tensors that slerp turned"] > 0 for values in STORED["values"].values())


def test_the_changelog_names_the_golden_vectors():
    assert STORED["digest"] == golden.digest(STORED["values"]), f"golden.json was edited by hand. {WHAT_TO_DO}"
    changelog = golden.CHANGELOG.read_text(encoding="utf-8")
    found = golden.section_of(changelog, STORED["digest"])
    assert found is not None, f"CHANGELOG.md has no line about golden vectors {STORED['digest']}. {WHAT_TO_DO}"
    version, heading = found
    assert heading == "Changed", f"golden vectors {STORED['digest']} are under {heading!r} in CHANGELOG.md"
    # In the version that made them or a later one, never in a release of before.
    order = golden.versions(changelog)
    assert order.index(version) <= order.index(STORED["version"]), f"golden vectors are listed under {version}"


def test_a_change_is_found():
    old = {"a": [1.0, 2.0], "b": {"c": 3.0}}
    assert golden.moved(old, {"a": [1.0, 2.0 + 9e-7], "b": {"c": 3.0}}) == []
    assert golden.moved(old, {"a": [1.0, 2.0 + 2e-6], "b": {"c": 3.1}}) == [
        "b / c: was 3, now 3.1, by 1.00e-01",
        "a[1]: was 2, now 2.000002, by 2.00e-06",
    ]
    assert golden.moved(old, {"a": [1.0, float("nan")], "b": {"c": 3.0}})
    assert golden.moved(old, {"a": [1.0], "b": {"c": 3.0}}) == ["not in both: a[1]"]
    changelog = "## [Unreleased]\n### Changed\n- x\n## [0.2.0] - day\n### Changed\n- Golden vectors 12ab: x\n"
    assert golden.section_of(changelog, "12ab") == ("0.2.0", "Changed")
    assert golden.section_of(changelog, "34cd") is None


CHILD = """
import json, sys
import torch
from pyqemb import _C
sys.path.insert(0, sys.argv[1])
import make
_C.set_isa(sys.argv[2])
torch.set_num_threads(2)
stored = json.loads(make.STORE.read_text(encoding="utf-8"))["values"]
moved = [line for name in make.FORMS for line in make.moved(stored[name], make.values_of(name))]
sys.exit("\\n".join(moved[:8]) or 0)
"""
# What holds torch and its libraries to an instruction set: on the machine of another user they may have no more.
TORCH = {
    "generic": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {},
}


@pytest.mark.deep
@pytest.mark.parametrize("isa", _C.available_isas())
def test_of_every_instruction_set(isa):
    child = subprocess.run(
        [sys.executable, "-c", CHILD, golden.HERE, isa],
        env={**os.environ, **TORCH[isa], "OMP_WAIT_POLICY": "passive"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
