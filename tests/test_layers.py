"""The arrows of docs/design.md point down: who imports whom in Python, who includes whom in C++."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
JOBS = {"encoding", "training", "merging", "evaluation", "curation", "synthesis"}
# package -> packages of pyqemb that it may import (itself always).
PYTHON = {
    "errors": set(),
    "ops": {"errors"},
    "data": {"errors"},
    "model": {"errors", "data", "ops"},
    "jobs": {"errors", "data"},
    "interop": {"errors", "data", "ops", "model"},
    "encoding": {"errors", "data", "jobs", "model"},
    "training": {"errors", "data", "jobs", "ops", "model"},
    "evaluation": {"errors", "data", "ops", "model"},
    "llm": {"errors", "data", "model"},
    "curation": {"errors", "data", "jobs", "ops", "model", "llm"},
    "synthesis": {"errors", "data", "ops", "model", "llm"},
    "merging": {"errors", "data", "model"},
    "demo": {"errors", "data", "ops", "model"} | JOBS,
    "api": {"errors", "data", "jobs"} | JOBS,
    "cli": {"errors", "data", "ops", "model", "interop", "llm", "demo", "api", "jobs"} | JOBS,
    "testing": {"errors", "data", "ops", "model"} | JOBS,
}
CPP = {
    "common": set(),
    "ops": {"common"},
    "cpu": {"ops", "common"},
    "cuda": {"ops", "common", "emulator"},  # the emulator in place of the CUDA runtime, in the tests
    "bindings": {"ops", "common", "cpu", "cuda"},
}


def python_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        found |= {module.split(".")[1] for module in modules if module.startswith("pyqemb.") and "." in module}
    return found


@pytest.mark.parametrize("package", [name for name in PYTHON if list((ROOT / "pyqemb").glob(f"{name}*/*.py"))])
def test_python_arrows_point_down(package):
    home = ROOT / "pyqemb" / package
    files = [home.with_suffix(".py")] if home.with_suffix(".py").exists() else sorted(home.rglob("*.py"))
    assert files
    for path in files:
        upward = python_imports(path) - PYTHON[package] - {package, "__version__"}
        native = {"_C"} & upward if package in ("ops", "testing", "cli") else set()
        assert not upward - native, f"{path.relative_to(ROOT)} imports {sorted(upward - native)}"


@pytest.mark.parametrize("folder", CPP)
def test_cpp_arrows_point_down(folder):
    for path in sorted((ROOT / "csrc" / folder).rglob("*.*")):
        included = {name.split("/")[0] for name in re.findall(r'#include "(\w+/[^"]+)"', path.read_text())}
        assert included <= CPP[folder] | {folder}, f"{path.relative_to(ROOT)} includes {sorted(included)}"
        text = path.read_text()
        assert "torch/" not in re.sub(r"//.*", "", text) or folder == "bindings", f"{path} knows torch"
        assert folder == "bindings" or "pybind11" not in text, f"{path} knows Python"


def test_only_ops_reach_the_native_library():
    for path in (ROOT / "pyqemb").rglob("*.py"):
        if "_C" in python_imports(path):
            assert path.parent.name in ("ops", "cli", "testing"), path


@pytest.mark.promise("R28", "the syntax trees of all files")
def test_nothing_unsafe():
    """No pickle, no code from data, no shell, no network but the model hub's official client and the ranks of a run
    among themselves.
    """
    network = {"socket", "socketserver", "http", "urllib", "requests", "httpx", "aiohttp", "ftplib", "ssl"}
    connections = {"asyncio.open_connection", "asyncio.start_server", "asyncio.open_unix_connection"}
    for path in (ROOT / "pyqemb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "shelve", "marshal", "dill"}, path
                assert not names & network, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if path != ROOT / "pyqemb" / "training" / "parallel" / "heartbeat.py":
                    assert called not in connections, (path, called)
                if called == "yaml.load" and "(yaml.SafeLoader)" in path.read_text():
                    continue
                assert called not in {"eval", "exec", "torch.load", "torch.save", "yaml.load", "os.system"}, (
                    path,
                    called,
                )
                for keyword in node.keywords:
                    unsafe = {"trust_remote_code", "shell", "allow_pickle"}
                    assert not (keyword.arg in unsafe and ast.unparse(keyword.value) == "True"), (path, called)


def test_no_call_has_more_than_eight_positional_arguments():
    for path in sorted((ROOT / "pyqemb").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                assert len(node.args) <= 8, f"{where}: {ast.unparse(node.func)} takes {len(node.args)}: name them"


def test_benchmarks_use_public_names():
    allowed = {"_C", "__version__"}
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyqemb"):
                private = {alias.name for alias in node.names if alias.name.startswith("_")} - allowed
                assert not private, f"{path.relative_to(ROOT)}:{node.lineno} imports {sorted(private)}"
