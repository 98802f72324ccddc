"""The C++ code built with sanitizers in a folder of its own, and the bugs that they must find in a copy of it."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
CMAKE = shutil.which("cmake", path=PATH)
SECONDS = 1800  # for one build or one run; a bug may end in a hang
OPTIONS = {
    # Wide red zones: a row before the first is further away than the usual 16 bytes.
    "ASAN_OPTIONS": "redzone=512:max_redzone=2048:detect_stack_use_after_return=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
REPORTS = re.compile(
    r"ERROR: AddressSanitizer|ERROR: LeakSanitizer|WARNING: ThreadSanitizer|runtime error:|outside of its operands"
)


@dataclass(frozen=True)
class Bug:
    why: str
    sanitizer: str  # QEMB_SANITIZE
    program: str
    file: str  # below csrc
    old: str  # occurs there exactly once
    new: str
    report: str  # what the sanitizer says


BUGS = [
    Bug("a read behind the documents", "address", "top_k", "cpu/kernels/top_k.cpp",
        "const int64_t count = min_of(kDocumentBlock, end - document);", "const int64_t count = kDocumentBlock;",
        "heap-buffer-overflow"),
    Bug("a read before the tokens", "address", "last_token_pool", "cpu/kernels/last_token_pool.cpp",
        "const Pooled<T> pooled(p, p.cu_seqlens[seq + 1] - 1, scratch);",
        "const Pooled<T> pooled(p, p.cu_seqlens[seq + 1] - 4, scratch);", "heap-buffer-overflow"),
    Bug("a write behind the scratch memory", "address", "last_token_pool", "cpu/kernels/last_token_pool.cpp",
        "rows_of_scratch<T>(p, 3)", "rows_of_scratch<T>(p, 2)", "heap-buffer-overflow"),
    Bug("a signed overflow", "address", "guard_pages", "cpu/kernels/shingles.cpp",
        "x = (x ^ (x >> 16)) * 0x85EBCA6Bu;", "x = static_cast<uint32_t>(static_cast<int32_t>(x) * 0x05EBCA6B);",
        "signed integer overflow"),
    Bug("a leak", "address", "attention", "cpu/parallel.cpp", "~Buffer() { std::free(data); }", "~Buffer() {}",
        "LeakSanitizer"),
    Bug("a read before a guarded operand", "address", "guard_pages", "cpu/kernels/swiglu.cpp",
        "load_row(dtype, from, at, buffer, count);", "load_row(dtype, from, at - 1, buffer, count);",
        "guard page before: memory outside of its operands"),
    Bug("a read behind a guarded operand", "address", "guard_pages", "cpu/kernels/swiglu.cpp",
        "load_row(dtype, from, at, buffer, count);", "load_row(dtype, from, at, buffer, count + 1);",
        "guard page behind: memory outside of its operands"),
    # A race shows if threads overlap; a program with little work is done before the second one wakes.
    Bug("scratch memory that threads share", "thread", "attention", "cpu/parallel.cpp", "thread_local Buffer buffers",
        "static Buffer buffers", "data race"),
    Bug("a counter that is not atomic", "thread", "attention", "cpu/parallel.cpp", "std::atomic<int64_t> next{0};",
        "struct {\n"
        "        int64_t value = 0;\n"
        "        int64_t fetch_add(int64_t more, std::memory_order) { return (value += more) - more; }\n"
        "        void store(int64_t other) { value = other; }\n"
        "    } next{};", "data race"),
]  # fmt: skip


def run(command: list, **environment: str) -> subprocess.CompletedProcess:
    """Output and errors together; a run that takes too long has failed."""
    try:
        return subprocess.run(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            timeout=SECONDS, env={**os.environ, "PATH": PATH, **OPTIONS, **environment},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return subprocess.CompletedProcess(command, 124, f"{error.stdout!r}\nno end after {SECONDS} s")


class Workshop:
    """A copy of the C++ code and its build."""

    def __init__(self, folder: Path, sanitizer: str, *options: str):
        self.source, self.binary = folder / "source", folder / "build"
        for name in ("csrc", "tests/cpp"):
            shutil.copytree(ROOT / name, self.source / name)
        shutil.copy(ROOT / "CMakeLists.txt", self.source)
        ninja = shutil.which("ninja", path=PATH)
        self._run_or_raise(
            CMAKE, "-S", self.source, "-B", self.binary, *(["-G", "Ninja"] if ninja else []), "-DPYQEMB_CUDA=off",
            "-DQEMB_TESTS=ON", f"-DQEMB_SANITIZE={sanitizer}", *options,
        )  # fmt: skip

    def _run_or_raise(self, *command) -> None:
        done = run(list(command))
        if done.returncode:
            raise RuntimeError(done.stdout[-4000:])

    def build(self, *targets: str) -> None:
        self._run_or_raise(CMAKE, "--build", self.binary, "--parallel", "2", "--target", *targets)

    def programs(self) -> list[str]:
        return sorted(path.stem.removeprefix("test_") for path in (self.source / "tests" / "cpp").glob("test_*.cpp"))

    def build_programs(self, programs: list[str]) -> None:
        self.build(*(f"cpp_test_{name}" for name in programs))

    def run_program(self, program: str, threads: int = 3) -> subprocess.CompletedProcess:
        return run([self.binary / f"cpp_test_{program}"], QEMB_TEST_THREADS=str(threads))

    def plant(self, bug: Bug):
        """Replace the text of one file; returns a function that puts it back."""
        path = self.source / "csrc" / bug.file
        text = path.read_text()
        if text.count(bug.old) != 1:
            raise RuntimeError(f"{bug.file}: {text.count(bug.old)} times instead of once: {bug.old}")
        path.write_text(text.replace(bug.old, bug.new))
        return lambda: path.write_text(text)

    def complaint(self, bug: Bug) -> str:
        """What the program says to the bug."""
        restore = self.plant(bug)
        try:
            self.build_programs([bug.program])
            return self.run_program(bug.program).stdout
        finally:
            restore()


def preloaded(library: Path) -> str:
    """What Python, which is not instrumented, must load before a library that is: ASan, and the C++ runtime, without
    which ASan stops at the first exception.
    """
    linked = run(["ldd", library]).stdout
    return " ".join(re.findall(r"(?:libasan|libstdc\+\+)\S* => (\S+)", linked))
