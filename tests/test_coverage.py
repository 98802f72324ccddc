"""Every branch of the checkpoint, manifest and cache code and of the argument checks is taken, and mutants are killed.

The mutants are too many for a test: `make mutants` runs them and writes tests/mutants/results.json, which is read here.
"""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS, EQUIVALENT = (ROOT / "tests" / "mutants" / name for name in ("results.json", "equivalent.json"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


measure = load(ROOT / "tests" / "measure_coverage.py")
LISTED = [name.removesuffix(".py").replace("/", ".") for name in measure.TOOLS["mutmut"]["only_mutate"]]


def test_every_branch_is_taken(record_property, monkeypatch, tmp_path):
    pytest.importorskip("coverage", reason="coverage is not installed (pip install 'pyqemb[dev]')")
    monkeypatch.setattr(measure, "PLACE", tmp_path)
    found = measure.modules()
    assert measure.incomplete(found) == []
    branches = sum(file["summary"]["num_branches"] for file in found.values())
    record_property("R30", f"{branches} of {branches} branches of {len(found)} modules")


def test_what_is_missing_is_reported():
    whole = {"missing_lines": [], "missing_branches": []}
    files = {"a": whole, "b": {**whole, "missing_lines": [3]}, "c": {**whole, "missing_branches": [[4, 5]]}}
    assert measure.incomplete(files) == ["b: lines [3], branches []", "c: lines [], branches [[4, 5]]"]


def test_mutants_are_killed(record_property):
    """At least 90 % of those of each module that are not listed as equivalent."""
    results, equivalent = json.loads(RESULTS.read_text()), json.loads(EQUIVALENT.read_text())
    assert sorted(results["modules"]) == sorted(LISTED)
    killed = total = left_out = 0
    for module, row in results["modules"].items():
        survived, known = row["survived"], equivalent.get(module, {})
        assert row["killed"] + len(survived) == row["run"]
        assert 3 * row["run"] >= row["mutants"], f"{module}: fewer than a third of the mutants were run"
        assert set(known) <= set(survived), f"{module}: no longer survives, so it is not equivalent"
        assert all(known.values()), f"{module}: an equivalent mutant needs a reason"
        excluded = sum(change in known for change in survived)
        share = row["killed"] / (row["run"] - excluded)
        assert share >= 0.9, f"{module}: {share:.1%} of the mutants are killed"
        killed, total, left_out = killed + row["killed"], total + row["run"] - excluded, left_out + excluded
    record_property(
        "R30",
        f"{killed:,} of {total:,} mutants killed ({killed / total:.1%}), {left_out} equivalent ones left out "
        f"({results['date']})",
    )


def test_coverage_is_known(record_property):
    """Measured by `make coverage`, which takes longer than all tests."""
    kept = json.loads(measure.STORE.read_text())
    for part, what in (("python", "pyqemb, at least"), ("native", "csrc")):
        row = kept[part]
        taken, count = row["branches"]
        assert 0 < taken <= count
        record_property("R30", f"{what}: {taken:,} of {count:,} branches ({taken / count:.0%}; {row['date']})")


def test_each_listed_module_has_its_tests():
    selected = [each for each in measure.TOOLS["mutmut"]["pytest_add_cli_args_test_selection"] if each.endswith(".py")]
    expected = [f"tests/{name.removeprefix('pyqemb.').replace('.', '/')}" for name in LISTED]
    assert sorted(selected) == sorted(
        f"{folder}/test_{name}.py" for folder, _, name in (e.rpartition("/") for e in expected)
    )
    assert all((ROOT / each).is_file() for each in selected)
