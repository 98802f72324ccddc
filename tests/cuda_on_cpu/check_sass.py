"""What nvcc made of the kernels for each architecture: registers, spills, local memory, matrix instructions.

Reads object files, needs no GPU.

    python tests/cuda_on_cpu/check_sass.py build/native

Fails on an object without the code of an architecture that the build was configured for, on local memory (spills are
this too) beyond KNOWN_SPILLS, on more registers than a block of its threads can have, on a file of Hopper's kernels
without a wgmma (HGMMA), where ptxas lets wgmmas run one by one, a wait behind each, and where two warpgroups ask for
more registers (setmaxnreg) than a block starts with: they would wait for ever, which the emulator cannot show.
cuobjdump and nvdisasm come from the CUDA toolkit, or from PyPI's nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
Without objects or tools it says so and passes.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from pathlib import Path

REGISTERS = 255  # of a thread, by the architecture: ptxas spills rather than use more

# Bytes of stack that ptxas 13.0 needs where the registers of sm_80, sm_86 and sm_89 do not suffice. Their cost is not
# measured; a kernel that gets rid of them leaves this list.
KNOWN_SPILLS = {
    ("info_nce_kernels::score<true, float>", "90"): 16,
    ("info_nce_kernels::row_gradients<float>", "100"): 8,
    ("info_nce_kernels::row_gradients<float>", "120"): 32,
    **{(f"top_k_kernels::search<{dtype}>", "100"): 8 for dtype in ("BFloat16", "Float16")},
    **{
        (f"info_nce_kernels::{kernel}<{before}{dtype}>", arch): size
        for dtype in ("BFloat16", "Float16")
        for kernel, before, arch, size in (
            ("score", "false, ", "90", 24),
            ("score", "false, ", "100", 24),
            ("score", "false, ", "120", 8),
            ("row_gradients", "", "120", 16),
        )
    },
}


def find_tools() -> str | None:
    """The folder of cuobjdump and nvdisasm: of a wheel, or of the toolkit."""
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia"
    places = [*wheels.glob("cu*/bin"), *(Path(found).parent for found in [shutil.which("cuobjdump")] if found)]
    for place in places:
        if all((place / tool).exists() for tool in ("cuobjdump", "nvdisasm")):
            return str(place)
    return None


def expected(build: Path) -> tuple[list[str], list[str]]:
    """The architectures that CMake wrote down, oldest first: those with code, and that of the PTX."""
    code = re.findall(r"sm_(\w+)", (build / "cuda_architectures.txt").read_text())
    return code, code[:1]


def short(name: str) -> str:
    """A demangled kernel without its parameters."""
    name = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip() or name
    name = re.sub(r"\(anonymous namespace\)::|qemb::(cuda::)?", "", name)
    return re.sub(r"^void ", "", re.sub(r"\((?:[^()]|\([^()]*\))*\)$", "", name))


def dump(tools: str, path: Path, option: str) -> str:
    command = [f"{tools}/cuobjdump", option, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, env={"PATH": f"{tools}:/usr/bin:/bin"})
    if result.returncode:
        sys.exit(f"check_sass: {' '.join(command)} failed: {result.stderr.strip()}")
    return result.stdout


def contents(tools: str, path: Path) -> tuple[list[str], list[str]]:
    """The architectures for which an object file has code, and those for which it has PTX."""
    return tuple(
        re.findall(rf"\.sm_(\w+)\.{kind}", dump(tools, path, option))
        for kind, option in (("cubin", "-lelf"), ("ptx", "-lptx"))
    )


def usage(tools: str, path: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Of each kernel of an object file, by architecture: registers, and bytes of local memory (stack and arrays)."""
    found: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)
    arch, name = "", ""
    for match in re.finditer(
        r"^arch = sm_(\w+)|Function (\S+):|REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)",
        dump(tools, path, "-res-usage"),
        flags=re.M,
    ):
        arch, name = match[1] or arch, match[2] or name
        if match[3]:
            found[name][arch] = {"registers": int(match[3]), "local": int(match[4]) + int(match[5])}
    return found


def hopper_kernels(tools: str, path: Path) -> dict[str, tuple[int, int, int]]:
    """Of each kernel: its matrix instructions of Hopper, its waits for them, and the registers of a thread at entry
    that it needs for the sums of setmaxnreg: two warpgroups of a block's three take some of the third's.
    """
    bodies = re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", dump(tools, path, "-sass"), flags=re.S)

    def count(pattern: str, body: str) -> int:
        return len(re.findall(pattern, body))

    def registers(pattern: str, body: str) -> int:
        return max((int(found, 16) for found in re.findall(pattern, body)), default=0)

    return {
        name: (
            count(r"\bHGMMA\b", body),
            count(r"\bWARPGROUP\.DEPBAR\b", body),
            (
                2 * registers(r"USETMAXREG\.TRY_ALLOC\S* UP\d+, (0x[0-9a-f]+)", body)
                + registers(r"USETMAXREG\.DEALLOC\S* (0x[0-9a-f]+)", body)
                + 2
            )
            // 3,
        )
        for name, body in bodies
    }


def main(build: Path) -> int:
    """Print a row for each kernel; 1 where anything fails."""
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
    code, ptx = expected(build)
    columns = [*code, *(["90a"] if any(path.parent.name == "sm90" for path in objects) else [])]
    print("Registers of a thread, by architecture.\n")
    print(f"| kernel | {' | '.join(columns)} | wgmma |\n| --- |{' ---: |' * (len(columns) + 1)}")
    for path in objects:
        hopper = path.parent.name == "sm90"
        where = f"sm90/{path.stem.removesuffix('.cu')}" if hopper else path.stem.removesuffix(".cu")
        has_code, has_ptx = contents(tools, path)
        missing = [f"code of sm_{arch}" for arch in (["90a"] if hopper else code) if arch not in has_code]
        missing += [f"PTX of sm_{arch}" for arch in ([] if hopper else ptx) if arch not in has_ptx]
        for each in missing:
            print(f"check_sass: {where} has no {each}")
        bad += len(missing)
        products = hopper_kernels(tools, path) if hopper else {}
        if hopper and not any(count for count, *_ in products.values()):
            print(f"check_sass: {where} has no wgmma")
            bad += 1
        by_name = sorted((short(name), name, by_arch) for name, by_arch in usage(tools, path).items())
        for title, name, by_arch in by_name:
            count, waits, needed = products.get(name, (0, 0, 0))
            serialized = count > 0 and waits > count / 2
            cells = []
            wrong = serialized
            for arch in columns:
                use = by_arch.get(arch)
                cells.append("" if use is None else f"{use['registers']}")
                if use and use["local"]:
                    cells[-1] += f" and {use['local']} bytes of local memory"
                if use and use["registers"] < needed:
                    cells[-1] += f" of {needed} that setmaxnreg needs"
                    wrong = True
                allowed = KNOWN_SPILLS.get((title, arch), 0)
                wrong |= bool(use and (use["local"] > allowed or use["registers"] > REGISTERS))
            bad += wrong
            print(
                f"| {where}: {title}{' FAILS' if wrong else ''} | {' | '.join(cells)} | "
                f"{count or ''}{', serialized' if serialized else ''} |"
            )
    names = ", ".join(f"sm_{arch}" for arch in code)
    print(f"check_sass: {bad} checks fail" if bad else f"check_sass: all kernels pass, for {names}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/native")))
