"""Branch coverage of pyqemb and of csrc, in build/coverage, sums in tests/coverage.json; used by `make coverage`.

    python tests/measure_coverage.py [modules] [python] [native]      default: all three

modules   the modules under [tool.mutmut] in pyproject.toml by their own tests; exit code 1 below 100 % of branches
python    pyqemb by the tests that `make test` runs, without LONG
native    csrc by the C++ tests and the op tests; what runs on a GPU alone counts as not run
"""

import datetime
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PLACE, STORE = ROOT / "build" / "coverage", ROOT / "tests" / "coverage.json"
TESTS_FAILED = 1  # status of pytest if tests ran, and some failed; its other errors mean that none ran
TOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
OP_TESTS = [
    "arguments",
    "attention",
    "info_nce",
    "last_token_pool",
    "small_ops",
    "top_k",
    "shingles",
    "dispatch",
    "losses",
]
# Half of the time of `make test`: whole jobs and groups of processes, which take the branches that the others take.
LONG = """
    benchmarks crashes cuda_on_cpu demo docs fuzzing golden packaging recipes sanitizers security soak test_build.py
    test_coverage.py cli/test_exits.py interop/test_old_versions.py interop/test_verify.py ops/test_memory.py
    model/test_sentence_transformers.py ops/test_poisoned.py training/test_distributed.py training/test_nodes.py
    training/test_evaluation_ranks.py training/test_grad_cache_memory.py training/test_planner.py
    training/test_ranks.py training/test_repeats.py training/test_sharded_checkpoints.py training/test_sharding.py
"""
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}


def run(*command, cwd=ROOT, allowed=(0,), **environment):
    """Run a command; exit unless its status is one of `allowed`."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, env={**ENVIRONMENT, **environment}, check=False)
    if done.returncode not in allowed:
        sys.exit(f"exit status {done.returncode} of {command[0]}")


def measured(name, *tests, allowed=(0,), **environment):
    """The report of coverage.py as a dictionary by file, after these tests."""
    folder = PLACE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options = ["--data-file", folder / "data"]
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    run(sys.executable, "-m", "coverage", "run", *options, *pytest, allowed=allowed, PYTHONPATH=str(ROOT),
        **environment)  # fmt: skip
    run(sys.executable, "-m", "coverage", "combine", "-q", *options, folder)
    run(sys.executable, "-m", "coverage", "json", "-q", *options, "-o", folder / "report.json")
    return json.loads((folder / "report.json").read_text())["files"]


def modules():
    """By module: its branches and those that are not taken, or lines that are not run."""
    selection = TOOLS["mutmut"]["pytest_add_cli_args_test_selection"]
    options = ["-o", "addopts=--import-mode=importlib"]
    files = measured("modules", *options, *selection, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    return {name: files[name] for name in TOOLS["mutmut"]["only_mutate"]}


def incomplete(files):
    """What is missing, a line for each file."""
    return [
        f"{name}: lines {file['missing_lines']}, branches {file['missing_branches']}"
        for name, file in files.items()
        if file["missing_lines"] or file["missing_branches"]
    ]


def table(rows):
    """By name: lines and branches, as taken of all."""
    for name, numbers in rows.items():
        shares = [f"{taken} of {count} ({taken / max(count, 1):.1%})" for taken, count in numbers]
        print(f"{name:40} lines {shares[0]:24} branches {shares[1]}")


def counts(summary):
    return (
        (summary["covered_lines"], summary["num_statements"]),
        (summary["covered_branches"], summary["num_branches"]),
    )


def by_folder(rows):
    """The sums of the rows by the two first parts of their path, and of all."""
    sums = {}
    for path, numbers in rows.items():
        for name in ("/".join(Path(path).parts[:2]) if len(Path(path).parts) > 2 else Path(path).parts[0], "all"):
            before = sums.setdefault(name, ((0, 0), (0, 0)))
            sums[name] = tuple(tuple(map(sum, zip(*pair, strict=True))) for pair in zip(before, numbers, strict=True))
    return dict(sorted(sums.items()))


def native():
    """Lines and branches of csrc by file."""
    import pybind11

    build, package = PLACE / "native", PLACE / "package"
    run(
        "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DQEMB_COVERAGE=ON", "-DQEMB_GENERIC_ONLY=ON",
        "-DQEMB_TESTS=ON", "-DPYQEMB_CUDA=off", "-DQEMB_PYTHON=ON", "-DPYBIND11_FINDPYTHON=ON",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}",
    )  # fmt: skip
    run("cmake", "--build", build, "--parallel", "2")
    for data in build.rglob("*.gcda"):  # of an earlier run
        data.unlink()
    run("ctest", "--test-dir", build, "--output-on-failure", "-j2")
    shutil.rmtree(package, ignore_errors=True)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("pyqemb", "tests/ops"):
        shutil.copytree(ROOT / name, package / name, ignore=ignore)
    for name in ("tests/conftest.py", "tests/network.py", "pyproject.toml"):
        shutil.copy(ROOT / name, package / name)
    (library,) = build.glob("_C*.so")
    shutil.copy(library, package / "pyqemb")
    tests = [f"tests/ops/test_{name}.py" for name in OP_TESTS]
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not deep", *tests,
        cwd=package, allowed=(0, TESTS_FAILED), PYTHONPATH=str(package))  # fmt: skip
    report = PLACE / "native.json"
    # Branches to the handler of an exception that the compiler adds to every call are no decisions of the code.
    run("gcovr", "--root", ROOT, "--filter", "csrc/", "--exclude-throw-branches", "--exclude-unreachable-branches",
        "--gcov-ignore-errors=all", "--gcov-suspicious-hits-threshold=0",  # counts beyond 2^32 are right
        "--merge-lines", "--json-summary", report, build)  # fmt: skip
    return {
        file["filename"]: ((file["line_covered"], file["line_total"]), (file["branch_covered"], file["branch_total"]))
        for file in json.loads(report.read_text())["files"]
    }


def store(part, rows):
    """Print the sums of the rows, and keep that of all for docs/dev/reliability.md."""
    sums = by_folder(rows)
    table(sums)
    kept = json.loads(STORE.read_text()) if STORE.exists() else {}
    lines, branches = sums["all"]
    kept[part] = {"date": str(datetime.date.today()), "lines": lines, "branches": branches}
    STORE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def main(parts):
    missing = []
    if "python" in parts:
        tests = ["tests", "-m", "not deep", "-n", "2", "--dist", "loadfile"]
        files = measured(
            "python", *tests, *(f"--ignore=tests/{name}" for name in LONG.split()), allowed=(0, TESTS_FAILED)
        )
        store("python", {name: counts(file["summary"]) for name, file in files.items()})
    if "native" in parts:
        store("native", native())
    if "modules" in parts:
        found = modules()
        table({name: counts(file["summary"]) for name, file in found.items()})
        missing = incomplete(found)
    sys.exit("\n".join(missing) or 0)


if __name__ == "__main__":
    main(sys.argv[1:] or ["python", "native", "modules"])
