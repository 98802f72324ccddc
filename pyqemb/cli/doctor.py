"""`pyqemb doctor`: show the installation, and test its kernels, in a few seconds."""

import argparse
import json
from collections.abc import Callable
from typing import Any

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    from pyqemb.ops import cuda_is_built

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
    """Compare each op with plain torch in float64, on the CPU and on a supported GPU."""
    import torch

    from pyqemb.model.device import search_device
    from pyqemb.ops import cuda_is_built

    devices = ["cpu"]
    if torch.cuda.is_available() and cuda_is_built():
        devices.append(str(search_device(type("Model", (), {"device": "cuda"})())))
    checks: dict[str, Callable[[str], float]] = {
        "attention": _attention,
        "InfoNCE": _info_nce,
        "pooling": _pooling,
        "top-k": _top_k,
    }
    tests = []
    for device in devices:
        for name, check in checks.items():
            try:
                error = check(device)
                passed, detail = error < (1e-4 if device == "cpu" else 2e-2), f"greatest error {error:.1e}"
            except Exception as failure:  # any error is shown in the table
                passed, detail = False, f"{type(failure).__name__}: {failure}"
            tests.append({"name": f"{name}, {device}", "passed": passed, "detail": detail})
    return tests


def _attention(device: str) -> float:
    import torch

    from pyqemb import ops

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator, cu = torch.Generator().manual_seed(0), torch.tensor([0, 37, 38, 100], dtype=torch.int32)
    q, k, v = (torch.randn(100, heads, 64, generator=generator).to(dtype) for heads in (4, 2, 2))
    found = ops.varlen_attention(q.to(device), k.to(device), v.to(device), cu, causal=True).double().cpu()
    wanted = []
    for first, last in zip(cu, cu[1:], strict=False):
        a, b, c = (x[first:last].double().transpose(0, 1) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)
        wanted.append(out.transpose(0, 1))
    return float((found - torch.cat(wanted)).abs().max())


def _info_nce(device: str) -> float:
    import torch

    from pyqemb import ops

    generator = torch.Generator().manual_seed(0)
    queries, documents = (
        torch.nn.functional.normalize(torch.randn(n, 64, generator=generator), dim=1) for n in (40, 90)
    )
    positive = torch.arange(40)
    found = ops.info_nce(
        queries.to(device), documents.to(device), positive.to(device), preset="mnrl", temperature=0.1, margin=None
    )
    wanted = torch.nn.functional.cross_entropy(queries.double() @ documents.double().T / 0.1, positive)
    return abs(float(found) - float(wanted))


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
    queries, documents = torch.randn(9, 32, generator=generator), torch.randn(500, 32, generator=generator)
    found, _ = ops.top_k(queries.to(device), documents.to(device), 5)
    return float((found.double().cpu() - (queries.double() @ documents.double().T).topk(5).values).abs().max()) / 20
