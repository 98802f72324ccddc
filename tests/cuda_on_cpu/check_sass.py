"""What nvcc made of the kernels: registers, spills, local memory, matrix instructions.

Reads object files, needs no GPU.

    python tests/cuda_on_cpu/check_sass.py build/native

Fails on any load or store of local memory (spills are these too), on more registers than a block of its threads can
have, on a file of Hopper's kernels without a wgmma (HGMMA), and where ptxas lets wgmmas run one by one, a wait behind
each. cuobjdump and nvdisasm come from the CUDA toolkit, or from PyPI's nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
Without objects or tools it says so and passes.
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
        found[name]["wgmma"] = len(re.findall(r"\bHGMMA\b", body))
        found[name]["waits"] = len(re.findall(r"\bWARPGROUP\.DEPBAR\b", body))
    return found


def main(build: Path) -> int:
    objects = [
        path
        for library in ("qemb_cuda", "qemb_sm90")
        for path in sorted(build.glob(f"CMakeFiles/{library}.dir/csrc/cuda/**/*.cu.o"))
    ]
    if not objects:
        print(f"check_sass: skipped, {build} holds no CUDA objects (no nvcc when it was built)")
        return 0
    tools = find_tools()
    if tools is None:
        print(
            "check_sass: skipped, cuobjdump and nvdisasm were not found (pip install nvidia-cuda-cuobjdump "
            "nvidia-cuda-nvdisasm)"
        )
        return 0
    bad = 0
    print(
        "| kernel | registers | stack | local memory | instructions | wgmma |\n| --- | ---: | ---: | ---: | ---: | "
        "---: |"
    )
    for path in objects:
        found = kernels(tools, path)
        where = path.stem.removesuffix(".cu")
        if path.parent.name == "sm90":
            where = f"sm90/{where}"
            if not any(use["wgmma"] for use in found.values()):
                print(f"check_sass: {where} has no wgmma")
                bad += 1
        for name, use in sorted(found.items(), key=lambda item: short(item[0])):
            serialised = use["wgmma"] > 0 and use["waits"] > use["wgmma"] / 2
            wrong = use["local"] > 0 or use["registers"] > REGISTERS or serialised
            bad += wrong
            print(
                f"| {where}: {short(name)}{' FAILS' if wrong else ''} | {use['registers']} | {use['stack']} | "
                f"{use['local']} "
                f"| {use['instructions']} | {use['wgmma']}{', serialised' if serialised else ''} |"
            )
    print(f"check_sass: {bad} kernels fail" if bad else "check_sass: all kernels pass")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/native")))
