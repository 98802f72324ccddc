"""ASan, UBSan, LSan and TSan find nothing in the CPU code, and find the bugs that are planted in a copy of it."""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("sanitizer_workshop", Path(__file__).with_name("workshop.py"))
workshop = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = workshop
spec.loader.exec_module(workshop)


@functools.cache
def unsupported() -> str:
    """Why sanitizers do not work here; empty if they do."""
    compiler = os.environ.get("CXX", "c++")
    if not workshop.CMAKE or not shutil.which(compiler):
        return "no cmake or no C++ compiler"
    for kind in ("address,undefined", "thread"):
        command = [compiler, "-x", "c++", "-", f"-fsanitize={kind}", "-o", os.devnull]
        done = subprocess.run(command, input="int main() {}", capture_output=True, text=True)
        if done.returncode:
            return f"{compiler} has no -fsanitize={kind}"
    return ""


@pytest.fixture(autouse=True)
def supported():
    if reason := unsupported():
        pytest.skip(reason)


QUICK = ["guard_pages", "last_token_pool", "top_k"]
ALL = {kind: [bug for bug in workshop.BUGS if bug.sanitizer == kind] for kind in ("address", "thread")}
OPS = ["arguments", "attention", "info_nce", "top_k", "shingles"]


def assert_clean(done):
    assert not workshop.REPORTS.search(done.stdout), done.stdout[:6000]
    assert done.returncode == 0, done.stdout[-6000:]


def assert_caught(place, bug):
    complaint = place.complaint(bug)
    assert bug.report in complaint, f"{bug.why} was not found:\n{complaint[-3000:]}"


@pytest.mark.slow
@pytest.mark.promise("R18", "ASan and UBSan over three C++ programs (generic kernels); a planted bug is caught")
def test_quick_programs_are_clean_and_a_planted_bug_is_found(tmp_path):
    place = workshop.Workshop(tmp_path, "address", "-DQEMB_GENERIC_ONLY=ON", "-DQEMB_PYTHON=OFF")
    place.build_programs(QUICK)
    for program in QUICK:
        assert_clean(place.run_program(program))
    assert_caught(place, ALL["address"][0])


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """All kernels and the Python module, built with ASan and UBSan."""
    if reason := unsupported():
        pytest.skip(reason)
    pybind11 = pytest.importorskip("pybind11")
    return workshop.Workshop(
        tmp_path_factory.mktemp("address"), "address", "-DQEMB_PYTHON=ON", "-DPYBIND11_FINDPYTHON=ON",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}",
    )  # fmt: skip


@pytest.fixture(scope="module")
def thread(tmp_path_factory):
    """The generic kernels, built with TSan: how threads share the work does not depend on the instruction set."""
    if reason := unsupported():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("thread")
    return workshop.Workshop(folder, "thread", "-DQEMB_GENERIC_ONLY=ON", "-DQEMB_PYTHON=OFF")


@pytest.mark.deep
@pytest.mark.promise("R18", "ASan, UBSan and LSan over all C++ programs and instruction sets: no report")
def test_no_program_has_a_report_of_asan_ubsan_or_lsan(address):
    address.build_programs(address.programs())
    for program in address.programs():
        assert_clean(address.run_program(program))


@pytest.mark.deep
@pytest.mark.promise("R18", "TSan over all C++ programs (generic kernels) with 2 and 3 threads: no report")
@pytest.mark.parametrize("threads", [2, 3])
def test_no_program_has_a_report_of_tsan(thread, threads):
    thread.build_programs(thread.programs())
    for program in thread.programs():
        assert_clean(thread.run_program(program, threads))


@pytest.mark.deep
@pytest.mark.promise("R18", f"{len(workshop.BUGS)} planted bugs, all caught")
@pytest.mark.parametrize("bug", workshop.BUGS, ids=lambda bug: bug.why.replace(" ", "-"))
def test_every_planted_bug_is_found(request, bug):
    assert_caught(request.getfixturevalue(bug.sanitizer), bug)


class Package:
    """A copy of the package and of its tests, with the instrumented library."""

    def __init__(self, folder, place):
        self.folder, self.place = folder, place
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(workshop.ROOT / "pyqemb", folder / "pyqemb", ignore=ignore)
        shutil.copytree(workshop.ROOT / "tests" / "ops", folder / "tests" / "ops", ignore=ignore)
        for name in ("conftest.py", "network.py"):
            shutil.copy(workshop.ROOT / "tests" / name, folder / "tests")
        shutil.copy(workshop.ROOT / "pyproject.toml", folder)

    def build(self):
        self.place.build("_C")
        for old in (self.folder / "pyqemb").glob("_C*.so"):
            old.unlink()
        (built,) = self.place.binary.glob("_C*.so")
        self.library = shutil.copy(built, self.folder / "pyqemb")

    def run(self, *code):
        """A Python process that finds the copy first. LSan would report what Python and torch keep until the end; wide
        red zones around every Python object take gigabytes.
        """
        asan = workshop.OPTIONS["ASAN_OPTIONS"] + ":redzone=32:max_redzone=512:detect_leaks=0"
        command = f"cd {self.folder} && exec {sys.executable} {' '.join(code)}"
        return workshop.run(
            ["sh", "-c", command],
            LD_PRELOAD=workshop.preloaded(self.library), ASAN_OPTIONS=asan, PYTHONMALLOC="malloc", OMP_NUM_THREADS="1",
            PYTHONPATH=str(self.folder), PYTEST_ADDOPTS="",
        )  # fmt: skip

    def run_tests(self, name):
        # Without -s a report would be lost with the process that pytest keeps its output for.
        return self.run("-m pytest -q -x -s -p no:cacheprovider -m 'not deep'", f"tests/ops/test_{name}.py")


@pytest.fixture(scope="module")
def package(tmp_path_factory, address):
    made = Package(tmp_path_factory.mktemp("package"), address)
    made.build()
    if "libasan" not in workshop.preloaded(made.library):
        pytest.skip("the compiler links ASan statically, and Python has to preload it: use g++")
    where = made.run("-c 'import pyqemb.ops, pyqemb._C; print(pyqemb._C.__file__)'")
    assert str(made.folder) in where.stdout, where.stdout
    return made


@pytest.mark.deep
@pytest.mark.promise("R18", f"ASan and UBSan under the Python tests of {', '.join(OPS)}: no report")
@pytest.mark.parametrize("name", OPS)
def test_no_python_test_has_a_report(package, name):
    assert_clean(package.run_tests(name))


@pytest.mark.deep
@pytest.mark.promise("R18", "a planted bug is caught under the Python tests")
def test_a_planted_bug_is_found_from_python(package):
    restore = package.place.plant(ALL["address"][0])
    try:
        package.build()
        assert "ERROR: AddressSanitizer" in package.run_tests("top_k").stdout
    finally:
        restore()
        package.build()
