"""Records of the ops, with the rules of tests/ops/test_arguments.py."""

import inspect
from random import Random
from typing import Any

from arguments_harness import Record
from arguments_place import Place, Records
from arguments_public import key_of


class OpRecord(Record):
    """An op of tests/ops/test_arguments.py, with the rules of that file."""

    def __init__(self, name: str, ops_tests: Any):
        self.name, self.tests = name, ops_tests
        super().__init__(self._call, self._make)

    def _make(self, r: Random) -> dict[str, Any]:
        self.op = self.tests.catalogue(r.randrange(1000))[self.name]
        return self.op.arguments

    def _call(self, **given: Any) -> Any:
        return self.op(**given)

    def parameters(self) -> list[str]:
        return list(self.tests.catalogue()[self.name].rules)

    def broken(self, arguments: Any) -> list[tuple[str, Any, str]]:
        return [(name, value, rf"\b{name}\b") for name, value in self.tests.broken_calls(self.op)]


def add(records: Records, place: Place) -> None:
    ops_tests = place.ops_tests
    for name in ops_tests.catalogue():
        records[f"op {name}"] = OpRecord(name, ops_tests)
        records[f"op {name}"].target = key_of(inspect.unwrap(ops_tests.catalogue()[name].call))
