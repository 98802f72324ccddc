"""Runs the mutants of the modules that pyproject.toml lists under [tool.mutmut], and writes how many are killed.

    python tests/mutants/run.py [MODULE ...] [--processes 2]

mutmut writes the mutants, all of a module into one file, and an environment variable selects one. mutmut's own runner
starts pytest for each mutant; this one collects the tests once and runs, in forks of the process that collected them,
those that call the mutated function, the fastest first, until one fails. A fork runs the mutants of one function. At
its end it runs the tests without a mutant: if one fails then, each mutant of the function gets a fork of its own.

results.json lists the survivors by their change; equivalent.json says of which no test could tell the difference.
"""

import argparse
import ast
import datetime
import difflib
import fnmatch
import gc
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "build" / "mutants"
RESULTS, EQUIVALENT = Path(__file__).with_name("results.json"), Path(__file__).with_name("equivalent.json")
FOUND = PLACE / "found.jsonl"  # the result of each mutant so far
VARIABLE = "MUTANT_UNDER_TEST"
BEFORE, AFTER = "before", "after"  # runs without a mutant
CPU_LIMIT, WALL_LIMIT = 20.0, 300.0  # seconds of a mutant; one that loops forever is killed, and counts as such


def write_mutants(patterns: list[str]) -> dict[str, str]:
    """A copy of the package with the mutants; returns the change of each mutant by its name."""
    from mutmut.configuration import config
    from mutmut.mutation.file_mutation import mutate_file_contents

    os.chdir(ROOT)
    shutil.rmtree(PLACE, ignore_errors=True)
    for name in ("pyqemb", "tests"):
        shutil.copytree(ROOT / name, PLACE / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", PLACE)
    changes = {}
    for file in config().only_mutate:
        module = file.removesuffix(".py").replace("/", ".")
        if patterns and not any(fnmatch.fnmatch(module, pattern) for pattern in patterns):
            continue
        made = mutate_file_contents(file, (ROOT / file).read_text())
        (PLACE / file).write_text(made.code)
        functions = {
            node.name: ast.unparse(node.body).splitlines()
            for node in ast.walk(ast.parse(made.code))
            if isinstance(node, ast.FunctionDef)
        }
        arguments = {
            node.name: ast.unparse(node.args)
            for node in ast.walk(ast.parse(made.code))
            if isinstance(node, ast.FunctionDef)
        }
        for name in made.mutant_names:
            original = name.rpartition("__mutmut_")[0] + "__mutmut_orig"
            before, after = ([arguments[each], *functions[each]] for each in (original, name))
            lines = [line for line in difflib.ndiff(before, after) if line[:2] in ("- ", "+ ")]
            changes[f"{module}.{name}"] = " ".join(" ".join(lines).split())
    return changes


def function_of(mutant: str) -> str:
    """The name under which mutmut counts the calls of the function."""
    return mutant.rpartition("__mutmut_")[0]


class Runner:
    """The pytest plugin: it takes the place of the loop over the tests."""

    def __init__(self, mutants: list[str], processes: int):
        self.mutants, self.processes = mutants, processes

    def pytest_runtestloop(self, session):
        self.folders = session.config._tmp_path_factory
        self.items, self.seconds, self.tests = session.items, {}, defaultdict(list)
        self.collect_calls()
        names = defaultdict(list)
        for mutant in self.mutants:
            names[function_of(mutant)].append(mutant)
        # Every third mutant of each function first: a run that is stopped has a sample of all.
        batches = [part for first in (slice(0, None, 3), slice(1, None, 3), slice(2, None, 3))
                   for each in sorted(names.values(), key=len, reverse=True) if (part := each[first])]  # fmt: skip
        gc.freeze()  # a fork that collects garbage would copy all memory
        workers = [self.fork_worker(batches[place :: self.processes]) for place in range(self.processes)]
        for worker in workers:
            os.waitpid(worker, 0)
        return True

    def collect_calls(self):
        from mutmut.mutation.trampoline import set_mutant_under_test
        from mutmut.state import state

        state()._stats.clear()
        set_mutant_under_test("stats")
        for item in self.items:
            start = time.process_time()
            if failures := self.failures(item):
                raise RuntimeError(f"{item.nodeid} fails without a mutant: {failures[0]}")
            self.seconds[item] = time.process_time() - start
            for function in state()._stats:
                self.tests[function].append(item)
            state()._stats.clear()
        set_mutant_under_test(None)
        os.environ[VARIABLE] = ""

    def failures(self, item) -> list[str]:
        from _pytest.runner import runtestprotocol

        return [report.longreprtext for report in runtestprotocol(item, log=False, nextitem=None) if report.failed]

    def killed(self, mutant: str, tests) -> bool:
        os.environ[VARIABLE] = mutant
        try:
            for item in sorted(tests, key=self.seconds.get):
                if failures := self.failures(item):
                    if mutant == BEFORE:
                        (PLACE / "failures.txt").open("a").write(f"{item.nodeid}\n{failures[0]}\n")
                    return True
            return False
        finally:
            os.environ[VARIABLE] = ""

    def fork_worker(self, batches) -> int:
        process = os.fork()
        if process:
            return process
        self.folders._basetemp = Path(tempfile.mkdtemp(dir=self.folders.getbasetemp()))  # not shared: names are counted
        for batch in batches:
            found = self.run_batch(batch)
            if found.pop(AFTER, "survived") != "survived":  # a mutant has changed the process for the next ones
                found = {}
                for mutant in batch:
                    found |= self.run_batch([mutant])
                found.pop(AFTER, None)
            if found.pop(BEFORE, "survived") != "survived":
                found = dict.fromkeys(batch, "tests fail without a mutant")
            with FOUND.open("a") as file:
                file.write("".join(f"{json.dumps(each)}\n" for each in found.items()))
        os._exit(0)

    def run_batch(self, mutants: list[str]) -> dict[str, str]:
        """The result of each mutant, and of the code without one before and after them."""
        if not self.tests[function_of(mutants[0])]:
            return dict.fromkeys(mutants, "no tests")
        results, rest = {}, [BEFORE, *mutants, AFTER]
        while rest:
            reader, writer = os.pipe()
            process = os.fork()
            if not process:
                self.child(rest, function_of(mutants[0]), writer)
            os.close(writer)
            found = self.follow(process, reader, len(rest))
            results |= dict(zip(rest, found, strict=False))
            rest = rest[len(found) :]
        return results

    def child(self, mutants: list[str], function: str, writer: int):
        os.setsid()
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1), os.dup2(sink, 2)
        try:
            for mutant in mutants:
                try:
                    killed = self.killed(mutant, self.tests[function])
                except BaseException:
                    killed = True
                os.write(writer, b"k" if killed else b"s")
        finally:
            os._exit(0)

    def follow(self, process: int, reader: int, count: int) -> list[str]:
        """What a child reports; a last "timeout" or "crash" if it did not come to its end."""
        found, start, used = [], time.monotonic(), 0.0
        while len(found) < count:
            if select.select([reader], [], [], 1.0)[0]:
                code = os.read(reader, 1)
                if not code:
                    found.append("crash")
                    break
                found.append({b"k": "killed", b"s": "survived"}[code])
                start, used = time.monotonic(), cpu_seconds(process)
            elif cpu_seconds(process) - used > CPU_LIMIT or time.monotonic() - start > WALL_LIMIT:
                found.append("timeout")
                break
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reader)
        return found


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def found() -> dict[str, str]:
    return dict(map(json.loads, FOUND.read_text().splitlines())) if FOUND.exists() else {}


def run_tests(names: Path, processes: int) -> None:
    """In the folder of the mutants: the tests."""
    import pytest
    from mutmut.configuration import config

    os.environ[VARIABLE] = ""
    options = [*config().pytest_add_cli_args, *config().pytest_add_cli_args_test_selection]
    quiet = ["-q", "--rootdir=.", "-o", "tmp_path_retention_policy=none"]
    rest = [mutant for mutant in json.loads(names.read_text()) if mutant not in found()]
    runner = Runner(rest, processes)
    sys.exit(pytest.main([*quiet, *options], plugins=[runner]))


def summary(changes: dict[str, str], results: dict[str, str]) -> dict:
    """By module: how many mutants there are, were run and are killed, and the changes of those that survived."""
    modules: dict[str, dict] = {}
    for mutant, change in changes.items():
        function = function_of(mutant).rpartition(".")[2].lstrip("x").strip("_\u01c1").replace("\u01c1", ".")
        row = modules.setdefault(mutant.rpartition(".")[0], {"mutants": 0, "run": 0, "killed": 0, "survived": []})
        row["mutants"] += 1
        row["run"] += mutant in results
        if results.get(mutant) in ("killed", "timeout", "crash"):
            row["killed"] += 1
        elif mutant in results:
            row["survived"].append(f"{function}: {change}")
    return modules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="e.g. pyqemb.data.blocks, or a pattern; default: all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, help="stop then; every third mutant of each function comes first")
    parser.add_argument("--continue", action="store_true", dest="again", help="go on with a run that was stopped")
    parser.add_argument("--in-place", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_place:
        run_tests(args.in_place, args.processes)
    names = PLACE / "changes.json"
    if not args.again:
        made = write_mutants(args.modules)
        if not made:
            parser.error(f"no module of [tool.mutmut] matches {' '.join(args.modules)}")
        names.write_text(json.dumps(made))
    changes = json.loads(names.read_text())
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PLACE), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__)), "--in-place", str(names), "--processes", str(args.processes)]
    with subprocess.Popen(command, cwd=PLACE, env=environment, start_new_session=True) as process:
        try:
            code = process.wait(args.minutes and 60 * args.minutes)
        except subprocess.TimeoutExpired:
            code = 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if code:
        sys.exit(code)
    modules = summary(changes, found())
    store = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"modules": {}}
    store["modules"] |= modules
    store["date"] = datetime.date.today().isoformat()
    RESULTS.write_text(json.dumps(store, indent=1, sort_keys=True) + "\n")
    for module, row in sorted(modules.items()):
        print(f"{module}: {row['killed']} of {row['run']} killed")
        print(*(f"    {each}" for each in row["survived"]), sep="\n")


if __name__ == "__main__":
    main()
