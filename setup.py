"""Builds pyqemb._C with CMake and ninja. Everything else about the package is in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = Path(__file__).parent.resolve() / "build" / "native"  # one place, so that a second build is quick
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        configure = [
            _tool("cmake"), "-S", str(Path(__file__).parent.resolve()), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}", "-DPYBIND11_FINDPYTHON=ON",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DQEMB_PYTHON=ON",
            f"-DPYQEMB_CUDA={os.environ.get('PYQEMB_CUDA', 'auto')}",
            f"-DCMAKE_CUDA_ARCHITECTURES={_architectures()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]  # fmt: skip
        result = subprocess.run(configure, capture_output=True, text=True)
        if result.returncode:
            sys.exit(_explain(result.stdout + result.stderr))
        print(
            *re.findall("pyqemb: .*", result.stdout), sep="\n", flush=True
        )  # which backends are built, for which GPUs
        subprocess.run([_tool("cmake"), "--build", str(build), "--target", "_C"], check=True)
        print(f"pyqemb: {target.name} has {target.stat().st_size / 1e6:.1f} MB", flush=True)


def _architectures() -> str:
    """CUDA architectures in CMake's form; empty: all that nvcc and the kernels know."""
    return os.environ.get("CMAKE_CUDA_ARCHITECTURES") or os.environ.get("CUDAARCHS", "")


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        sys.exit(f"pyqemb: {name} was not found; `pip install cmake ninja`, or install without --no-build-isolation.")
    return found


def _explain(output: str) -> str:
    """The one sentence that helps, or CMake's whole output."""
    flat = " ".join(output.split())
    needs = "install g++ 11 or clang 14 (or newer), or set CXX to one."
    if needs_nvcc := re.search("pyqemb: PYQEMB_CUDA=on.*? in CUDACXX", flat):
        return needs_nvcc.group()
    if re.search(
        "No CMAKE_CXX_COMPILER could be found|Could not find (the )?compiler s|not a full path to an existing", flat
    ):
        return f"pyqemb: no C++ compiler was found; {needs}"
    if re.search(
        "pyqemb needs a C\\+\\+20 compiler|not able to compile a simple test program|identification is unknown", flat
    ):
        return f"pyqemb: needs a C++20 compiler, and {os.environ.get('CXX', 'the one found')} is not one; {needs}"
    return f"pyqemb: CMake could not configure the build.\n{output}"


setup(ext_modules=[Extension("pyqemb._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
