"""The native library: what it links, what it exports, and that no instruction set leaks into another's code."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OBJECTS = sorted((ROOT / "build" / "native" / "CMakeFiles").glob("qemb_*.dir/csrc/cpu/kernels/*.o"))


@pytest.mark.skipif(not OBJECTS, reason="built elsewhere: no object files in build/native")
def test_no_shared_symbol_holds_wide_instructions():
    """A weak symbol outside the namespace of its instruction set could be picked by the linker for every processor."""
    for path in OBJECTS:
        isa = re.search(r"qemb_(\w+)\.dir", str(path)).group(1)
        for line in subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout.splitlines():
            match = re.match(r"[0-9a-f]* +([WVuw]) (.*)", line)
            if match and match.group(1) in "WVu":
                assert f"qemb::cpu::{isa}::" in match.group(2), f"{path.name} ({isa}) shares {match.group(2)}"


def test_no_torch_library_is_linked():
    import pyqemb.ops as ops

    path = sys.modules["pyqemb._C"].__file__
    assert ops
    linked = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    assert "torch" not in linked
    assert "gomp" not in linked
    assert "cuda" not in linked


def test_the_module_imports_without_a_gpu():
    """Whether or not it was built with CUDA: cudart is linked statically, the driver is looked for when it is
    needed.
    """
    code = "from pyqemb import _C, ops; print(_C.cuda_is_built(), _C.cuda_device_count(), ops.cuda_is_built())"
    result = run_python(code, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split()[1] == "0", result.stdout + result.stderr


@pytest.mark.parametrize(
    ("option", "says"),
    [("auto", "no nvcc was found: CPU backend alone"), ("on", "PYQEMB_CUDA=on, but nvcc was not found")],
)
def test_without_nvcc_the_build_says_so(tmp_path, option, says):
    cmake = shutil.which("cmake") or pytest.skip("no cmake")
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    command = [
        cmake, "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-DQEMB_PYTHON=OFF", f"-DPYQEMB_CUDA={option}", "-DCMAKE_CUDA_COMPILER=NOTFOUND",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert says in " ".join((result.stdout + result.stderr).split())
    assert (result.returncode == 0) == (option == "auto"), result.stderr


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **env}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.promise("R22", "attention in a forked child")
def test_a_forked_child_does_not_hang():
    code = """
import os, signal, torch
from pyqemb import ops
q, cu = torch.randn(2000, 4, 64), torch.tensor([0, 1000, 2000], dtype=torch.int32)
expected = ops.varlen_attention(q, q, q, cu).numpy().tobytes()
child = os.fork()
if child == 0:
    signal.alarm(20)  # torch's own parallel ops would hang here, so the bytes are compared without them
    os._exit(0 if ops.varlen_attention(q, q, q, cu).numpy().tobytes() == expected else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert ops.varlen_attention(q, q, q, cu).numpy().tobytes() == expected
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_runs_on_the_threads_of_torch():
    code = "import torch; torch.set_num_threads(3); from pyqemb import ops, _C; assert _C.num_threads() == 3"
    assert run_python(code).returncode == 0


@pytest.mark.promise("R22", "another thread while attention runs")
def test_other_threads_run_while_an_op_works():
    code = """
import threading, time, torch
from pyqemb import ops
q, cu = torch.randn(6000, 8, 64), torch.tensor([0, 6000], dtype=torch.int32)
ticks, stop = [], threading.Event()
def count():
    while not stop.is_set():
        ticks.append(time.perf_counter()); time.sleep(0.005)
thread = threading.Thread(target=count); thread.start()
start = time.perf_counter(); ops.varlen_attention(q, q, q, cu); end = time.perf_counter()
stop.set(); thread.join()
inside = sum(start < tick < end for tick in ticks)
assert inside > (end - start) / 0.005 / 20, (inside, end - start)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_missing_compiler_is_one_clear_sentence(tmp_path):
    pytest.importorskip("pybind11", reason="pybind11 is only in the isolated build environment")
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "pyqemb").mkdir()
    shutil.copy(ROOT / "pyqemb" / "__init__.py", tmp_path / "pyqemb")
    for compiler, sentence in (
        ("/no/such/compiler", "no C++ compiler was found"),
        ("/bin/true", "needs a C++20 compiler"),
    ):
        result = subprocess.run(
            [sys.executable, "setup.py", "build_ext"], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "CXX": compiler, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )  # fmt: skip
        last = result.stderr.strip().splitlines()[-1]
        assert result.returncode != 0, result.stderr
        assert last.startswith("pyqemb: "), result.stderr
        assert sentence in last, result.stderr


@pytest.mark.parametrize("name", ["CUDAARCHS", "CMAKE_CUDA_ARCHITECTURES"])
def test_setup_passes_the_architectures_to_cmake(tmp_path, name):
    pytest.importorskip("pybind11", reason="pybind11 is only in the isolated build environment")
    for program in ("cmake", "ninja"):
        path = tmp_path / program
        path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words; exit 1\n')
        path.chmod(0o755)
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "pyqemb").mkdir()
    environment = {
        key: value for key, value in os.environ.items() if key not in ("CUDAARCHS", "CMAKE_CUDA_ARCHITECTURES")
    }
    environment |= {name: "89;120", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "setup.py", "build_ext"], cwd=tmp_path, capture_output=True, env=environment)
    assert done.returncode == 1, done.stderr
    assert "-DCMAKE_CUDA_ARCHITECTURES=89;120" in (tmp_path / "words").read_text().splitlines()


@pytest.mark.deep
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.skipif(not (Path(sys.executable).parent / "cmake").exists(), reason="no cmake in the environment")
@pytest.mark.parametrize(
    ("given", "wanted", "code", "hopper"),
    [
        ("CUDAARCHS", "", None, True),
        ("CUDAARCHS", "86;89", "sm_86,sm_89", False),
        ("CUDAARCHS", "120;80;90a-real", "sm_80,sm_90,sm_120", True),
        ("CUDAARCHS", "90a", "sm_90", True),
        ("CMAKE_CUDA_ARCHITECTURES", "89-real", "sm_89", False),
        ("CMAKE_CUDA_ARCHITECTURES", "", None, True),
        ("CMAKE_CUDA_ARCHITECTURES", "all", None, True),
        ("CMAKE_CUDA_ARCHITECTURES", "native", None, None),
    ],
)
def test_architectures(tmp_path, given, wanted, code, hopper):
    """The list of the environment or of CMake's variable; without one, all that this nvcc and the kernels know."""
    programs = Path(sys.executable).parent
    command = [programs / "cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DQEMB_PYTHON=OFF", "-DPYQEMB_CUDA=on"]
    if given == "CMAKE_CUDA_ARCHITECTURES":
        command.append(f"-D{given}={wanted}")
    environment = {**os.environ, "CUDAARCHS": "", "PATH": f"{programs}:{os.environ['PATH']}"}
    environment |= {given: wanted} if given == "CUDAARCHS" else {}
    for _ in range(2):  # a second configuration finds what the first one left in the cache
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        version = re.search(r"CUDA backend by \S+ (\d+)\.(\d+)", done.stdout)
        newest = ",sm_100,sm_120" if (int(version[1]), int(version[2])) >= (12, 8) else ""
        said = (tmp_path / "cuda_architectures.txt").read_text().strip()
        ninja = (tmp_path / "build.ninja").read_text()
        assert wanted == "native" or said == (code or f"sm_80,sm_86,sm_89,sm_90{newest}")
        assert f"code=[compute_{said.split(',')[0].removeprefix('sm_')},{said}]" in ninja
        assert hopper is None or ("qemb_sm90" in ninja) == hopper
