"""Every public function, class and method refuses a broken call with an error that names the argument.

`make test-deep` makes 2,000 broken calls of each. A public name without a record in records_*.py fails a test.
"""

import importlib.util
import inspect
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FAST, DEEP = 60, 2000  # broken calls of each


def load(path):
    spec = importlib.util.spec_from_file_location(f"arguments_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


harness = load(HERE / "harness.py")
places = load(HERE / "place.py")
public = load(HERE / "public.py")
parts = [load(path) for path in sorted(HERE.glob("records_*.py"))]
ops_tests = load(HERE.parent / "ops" / "test_arguments.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return places.Place(tmp_path_factory.mktemp("place"), ops_tests)


@pytest.fixture(scope="module")
def known(place):
    records = places.Records()
    for part in parts:
        part.add(records, place)
    return records


@pytest.fixture(autouse=True)
def quiet(caplog, monkeypatch, tmp_path):
    caplog.set_level("CRITICAL", logger="pyqemb")
    monkeypatch.chdir(tmp_path)


def broken_calls(known, place, count, seed):
    """(functions, calls); fails if a call is not refused as it must be."""
    wrong, calls = [], 0
    for name, record in known.items():
        done, found = harness.run(record, count, seed, None if record.cheap else place.folder)
        calls += done
        wrong += [f"{name}: {problem}" for problem in sorted(set(found))]
    assert not wrong, f"{len(wrong)} of {calls}:\n" + "\n".join(wrong[:60])
    return len(known), calls


def test_broken_calls_are_refused(known, place, record_property):
    functions, calls = broken_calls(known, place, FAST, 0)
    record_property("R17", f"{calls:,} broken calls of {functions} functions, classes and methods")


@pytest.mark.deep
def test_many_broken_calls_are_refused(known, place, record_property):
    functions, calls = broken_calls(known, place, DEEP, 1)
    record_property("R17", f"{calls:,} broken calls of {functions} functions, classes and methods")


def test_every_public_name_has_a_record(known):
    keys = {record.target or public.key_of(record.call) for record in known.values()}
    names = public.public_names()
    lacking = [key for key, item in names.items() if key not in keys and not public.is_exempt(key, item)]
    assert len(names) > 100
    assert not lacking


def test_every_argument_has_rules(known):
    for name, record in known.items():
        arguments = record.make(harness.Random(0))
        broken = {argument for argument, _, _ in record.broken(arguments)}
        assert not set(record.parameters()) - broken - set(record.free), name


def test_the_rules_of_ops_are_those_of_all_their_arguments():
    for name, op in ops_tests.catalogue().items():
        parameters = inspect.signature(op.call).parameters
        named = {harness.re.sub(r"_[A-Z0-9]+$", "", parameter) for parameter in parameters}
        if len(parameters) == len(named):
            assert named == {harness.re.sub(r"_T$", "", rule) for rule in op.rules}, name


def accepts_all(count: int, name: str = "a"):
    """Refuses nothing."""


def names_nothing(count: int):
    if not isinstance(count, int):
        raise TypeError("no")


def changes_its_input(items: list):
    items.append(1)
    raise TypeError("items")


@pytest.mark.parametrize(
    ("function", "arguments", "problem"),
    [
        (accepts_all, {"count": 1}, "accepted"),
        (names_nothing, {"count": 1}, "not named"),
        (lambda count: {}[count], {"count": 1}, "KeyError"),
    ],
)
def test_the_harness_finds_what_is_wrong(function, arguments, problem):
    record = harness.Record(function, lambda r: arguments, {"count": ["x"]}, cheap=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "call", function)
        wrong = []
        for name, value, pattern in record.broken(arguments):
            wrong.append(harness.one(record, {**arguments, name: value}, name, pattern))
    assert any(problem in str(each) for each in wrong)
