"""What nvcc made of the kernels: registers, spills, local memory. Reads object files, needs no GPU.

    python tests/cuda_on_cpu/check_sass.py build/native

Fails on any load or store of local memory (spills are these too) and on more registers than a block of its threads can have.
cuobjdump and nvdisasm come from the CUDA toolkit, or from PyPI's nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm. Without objects or tools it says so and passes.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

REGISTERS = 255  # of a thread, by the architecture: ptxas spills rather than use more


def find_tools() -> str | None:
    """The folder of cuobjdump and nvdisasm: of a wheel, or of the toolkit."""
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia"
    places = [*wheels.glob("cu*/bin"), *(Path(found).parent for found in [shutil.which("cuobjdump")] if found)]
    for place in places:
        if all((place / tool).exists() for tool in ("cuobjdump", "nvdisasm")):
            return str(place)
    return None


def short(name: str) -> str:
    """A demangled kernel without its parameters."""
    name = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip() or name
    name = re.sub(r"\(anonymous namespace\)::|qemb::(cuda::)?", "", name)
    return re.sub(r"^void ", "", re.sub(r"\((?:[^()]|\([^()]*\))*\)$", "", name))


def kernels(tools: str, path: Path) -> dict[str, dict[str, int]]:
    """Of each kernel of an object file: registers, bytes of stack, accesses of local memory, instructions."""

    def dump(option: str) -> str:
        command = [f"{tools}/cuobjdump", option, str(path)]
        result = subprocess.run(command, capture_output=True, text=True, env={"PATH": f"{tools}:/usr/bin:/bin"})
        if result.returncode:
            sys.exit(f"check_sass: {' '.join(command)} failed: {result.stderr.strip()}")
        return result.stdout

    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", dump("-res-usage"))
    found = {name: {"registers": int(registers), "stack": int(stack)} for name, registers, stack in usage}
    for name, body in re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", dump("-sass"), flags=re.S):
        found[name]["instructions"] = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", body, flags=re.M))
        found[name]["local"] = len(re.findall(r"\b(?:LDL|STL)\b", body))
    return found


def main(build: Path) -> int:
    objects = sorted(build.glob("CMakeFiles/qemb_cuda.dir/csrc/cuda/*.cu.o"))
    if not objects:
        print(f"check_sass: skipped, {build} holds no CUDA objects (no nvcc when it was built)")
        return 0
    tools = find_tools()
    if tools is None:
        print(
            "check_sass: skipped, cuobjdump and nvdisasm were not found (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)"
        )
        return 0
    bad = 0
    print("| kernel | registers | stack | local memory | instructions |\n| --- | ---: | ---: | ---: | ---: |")
    for path in objects:
        for name, use in sorted(kernels(tools, path).items(), key=lambda item: short(item[0])):
            wrong = use["local"] > 0 or use["registers"] > REGISTERS
            bad += wrong
            print(
                f"| {path.stem.removesuffix('.cu')}: {short(name)}{' FAILS' if wrong else ''} | {use['registers']} "
                f"| {use['stack']} | {use['local']} | {use['instructions']} |"
            )
    print(
        f"check_sass: {bad} kernels use local memory or too many registers" if bad else "check_sass: all kernels pass"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/native")))
