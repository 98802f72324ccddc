"""`pyqemb doctor`: show the installation, and test its kernels, in a few seconds."""

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_LIBRARIES = (
    "torch",
    "numpy",
    "tokenizers",
    "safetensors",
    "transformers",
    "sentence-transformers",
    "mteb",
    "peft",
    "faiss-cpu",
    "openai",
)
_TIMEOUT = 120  # seconds for the tests of one set of CUDA kernels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "PYQEMB_KERNELS=auto|80|90 in the environment chooses the CUDA kernels of a Hopper GPU: 80 are those of every "
        "GPU, 90 are Hopper's own; auto takes 90 once they have passed their tests on one."
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    facts, tests = _facts(), _self_test()
    good = all(test["passed"] for test in tests)
    if args.json:
        print(json.dumps({"facts": facts, "self-test": tests}, indent=1))
        return 0 if good else 1
    table = Table(show_header=False, title="pyqemb doctor")
    for name, value in facts.items():
        table.add_row(name, str(value))
    for test in tests:
        table.add_row(f"self-test: {test['name']}", f"{'passed' if test['passed'] else 'FAILED'}, {test['detail']}")
    Console().print(table)
    return 0 if good else 1


def _facts() -> dict[str, Any]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from pyqemb import _C, __version__
    from pyqemb.ops import cuda_is_built, kernel_sets

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    facts = {
        "pyqemb": __version__,
        "python": f"{platform.python_version()}, {platform.platform()}",
        "libraries": ", ".join(f"{name} {found}" for name in _LIBRARIES if (found := installed(name))),
        "instruction set": f"{_C.current_isa()} (of {', '.join(_C.available_isas())})",
        "threads": torch.get_num_threads(),
        "memory": _memory(torch.device("cpu")),
        "CUDA kernels": "built" if cuda_is_built() else "not built: nvcc was not found when pyqemb was installed",
    }
    if cuda_is_built():
        newest, why = kernel_sets.choose()
        facts["kernels on Hopper"] = f"those of sm_{newest} ({why})"
    for number in range(torch.cuda.device_count()):
        capability = ".".join(map(str, torch.cuda.get_device_capability(number)))
        facts[f"GPU {number}"] = (
            f"{torch.cuda.get_device_name(number)}, compute capability {capability}, "
            f"{_memory(torch.device('cuda', number))}"
        )
    if not torch.cuda.device_count():
        facts["GPU"] = "torch finds none" + ("" if torch.version.cuda else " (this build of torch has no CUDA)")
    return facts


def _memory(device: Any) -> str:
    from pyqemb.training.grad_cache.memory import free_bytes

    try:
        return f"{free_bytes(device) / 2**30:.1f} GiB free"
    except ValueError:
        return "unknown"


def _self_test() -> list[dict[str, Any]]:
    """Compare each op with plain torch in float64, on the CPU and on a supported GPU.

    Each set of CUDA kernels is tested in a process of its own, which is killed if a kernel hangs.
    """
    import torch

    from pyqemb import _C
    from pyqemb.model.device import gpu_is_usable

    tests = _tests_on("cpu", "cpu")
    if gpu_is_usable():
        hopper = torch.cuda.get_device_capability() == (9, 0) and _C.hopper_is_built()
        for kernels in ("80", "90") if hopper else ("80",):
            tests += _tests_in_a_process(kernels)
    return tests


def _tests_in_a_process(kernels: str) -> list[dict[str, Any]]:
    import os
    import subprocess
    import sys

    code = (
        "import json, sys; from pyqemb.cli.doctor import _tests_on; print(json.dumps(_tests_on('cuda', sys.argv[1])))"
    )
    label = f"cuda, kernels of sm_{kernels}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, label],
            env=os.environ | {"PYQEMB_KERNELS": kernels}, capture_output=True, text=True, timeout=_TIMEOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [{"name": label, "passed": False, "detail": f"no answer within {_TIMEOUT} s"}]
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        return [{"name": label, "passed": False, "detail": f"exit code {done.returncode}: {last}"}]
    tests: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return tests


def _tests_on(device: str, label: str) -> list[dict[str, Any]]:
    checks: dict[str, Callable[[str], float]] = {  # Hopper's own kernels of InfoNCE and top-k are for half types
        "attention, head_dim 64": lambda device: _attention(device, 64),
        "attention, head_dim 128": lambda device: _attention(device, 128),
        "InfoNCE, float32": lambda device: _info_nce(device, "float32"),
        "InfoNCE, bfloat16": lambda device: _info_nce(device, "bfloat16"),
        "pooling": _pooling,
        "top-k": _top_k,
    }
    tests = []
    for name, check in checks.items():
        if device == "cpu" and name == "InfoNCE, bfloat16":
            continue
        try:
            error = check(device)
            passed, detail = error < (1e-4 if device == "cpu" else 2e-2), f"greatest error {error:.1e}"
        except Exception as failure:  # any error is shown in the table
            passed, detail = False, f"{type(failure).__name__}: {failure}"
        tests.append({"name": f"{name}, {label}", "passed": passed, "detail": detail})
    return tests


def _attention(device: str, head_dim: int) -> float:
    """The greatest error of the output and of the three gradients, relative to the greatest value of each."""
    import torch

    from pyqemb import ops

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator, cu = torch.Generator().manual_seed(0), torch.tensor([0, 40, 190, 490], dtype=torch.int32)
    inputs = [torch.randn(490, heads, head_dim, generator=generator).to(dtype) for heads in (4, 2, 2)]
    dout = torch.randn(490, 4, head_dim, generator=generator).to(dtype)

    ours = [x.to(device).requires_grad_() for x in inputs]
    q, k, v = ours
    out = ops.varlen_attention(q, k, v, cu, causal=True)
    found = [out, *torch.autograd.grad(out, ours, dout.to(device))]

    exact = [x.double().requires_grad_() for x in inputs]
    parts = []
    for first, last in zip(cu, cu[1:], strict=False):
        a, b, c = (x[first:last].transpose(0, 1) for x in exact)
        part = torch.nn.functional.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)
        parts.append(part.transpose(0, 1))
    out = torch.cat(parts)
    wanted = [out, *torch.autograd.grad(out, exact, dout.double())]
    return _greatest(found, wanted)


def _greatest(found: "list[torch.Tensor]", wanted: "list[torch.Tensor]") -> float:
    """The greatest error, relative to the greatest value of its tensor."""
    pairs = [(x.detach().double().cpu(), y.detach()) for x, y in zip(found, wanted, strict=True)]
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


def _info_nce(device: str, dtype: str) -> float:
    """The greatest error of the loss and of both gradients, relative to the greatest value of each."""
    import torch

    from pyqemb import ops

    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.nn.functional.normalize(torch.randn(n, 64, generator=generator), dim=1).to(getattr(torch, dtype))
        for n in (40, 90)
    ]
    positive = torch.arange(40)

    queries, documents = (x.to(device).requires_grad_() for x in inputs)
    loss = ops.info_nce(queries, documents, positive.to(device), preset="mnrl", temperature=0.1, margin=None)
    found = [loss, *torch.autograd.grad(loss, [queries, documents])]

    exact = [x.double().requires_grad_() for x in inputs]
    loss = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T / 0.1, positive)
    return _greatest(found, [loss, *torch.autograd.grad(loss, exact)])


def _pooling(device: str) -> float:
    import torch

    from pyqemb import ops

    hidden, cu = (
        torch.randn(50, 64, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 20, 50], dtype=torch.int32),
    )
    found = ops.last_token_pool(hidden.to(device), cu.to(device)).double().cpu()
    return float((found - torch.nn.functional.normalize(hidden[[19, 49]].double(), dim=1)).abs().max())


def _top_k(device: str) -> float:
    import torch

    from pyqemb import ops

    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # Hopper's kernels are for half types
    queries, documents = (torch.randn(n, 32, generator=generator).to(dtype) for n in (9, 500))
    found, _ = ops.top_k(queries.to(device), documents.to(device), 5)
    return float((found.double().cpu() - (queries.double() @ documents.double().T).topk(5).values).abs().max()) / 20
