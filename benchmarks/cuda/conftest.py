"""The CUDA suite: every case on one device against its peers; one table, written to benchmarks/results/.

`--device cpu --tiny` runs the same code in seconds, for its test.
"""

import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pytest
import torch

from pyqemb import __version__, ops
from pyqemb.testing.device_bench import OURS, Meter, Report, on_older_kernels

HOPPER = ("attention", "loss")  # families with kernels of Hopper's own
_REPORT = Report("`make bench-cuda`", {})


@dataclass(frozen=True)
class Sizes:
    """What is measured: the shapes of Qwen3-Embedding-0.6B on 16384 packed tokens."""

    tokens: int = 16384
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    hidden: int = 1024
    intermediate: int = 3072
    layers: int = 28
    loss_rows: int = 8192
    many_rows: int = 65536
    search: tuple[int, int] = (4096, 1_000_000)
    pairs: int = 512
    compiled: bool = True


TINY = Sizes(
    tokens=128, heads=4, kv_heads=2, head_dim=64, hidden=64, intermediate=96, layers=1, loss_rows=48, many_rows=96,
    search=(8, 300), pairs=4, compiled=False,
)  # fmt: skip


@pytest.fixture(scope="session")
def sizes(request):
    return TINY if request.config.getoption("--tiny") else Sizes()


@pytest.fixture(scope="session")
def device(request):
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    if device.type == "cuda" and not ops.cuda_is_built():
        pytest.skip("this build of pyqemb has no CUDA kernels")
    return device


@pytest.fixture(scope="session")
def meter(device, sizes):
    return Meter(device, rounds=20 if sizes.compiled else 1)


@pytest.fixture
def compiled(sizes):
    """torch.compile from a clean slate; nothing at all in a tiny run."""
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # the backward passes are run again and again on one graph
    return torch.compile if sizes.compiled else lambda function, **_: function


@pytest.fixture
def measure(meter, request):
    """Meter.measure(...), recorded under the file's name."""

    def run(case, contenders, **options):
        torch.manual_seed(0)
        family = request.node.path.stem.removeprefix("bench_")
        if family in HOPPER and meter.on_gpu and torch.cuda.get_device_capability(meter.device) == (9, 0):
            contenders = {
                OURS: contenders[OURS],
                f"{OURS}, sm_80 kernels": on_older_kernels(contenders[OURS]),
                **contenders,
            }
        left_out = request.config.getoption("--without")
        contenders = {name: prepare for name, prepare in contenders.items() if name not in left_out}
        found = meter.measure(family, case, contenders, **options)
        _REPORT.found.append(found)
        _REPORT.environment = _environment(meter.device)
        return found

    return run


def pytest_terminal_summary(terminalreporter, config):
    if not _REPORT.found:
        return
    terminalreporter.write_line(f"\n{_REPORT.environment}\n{_REPORT.table()}")
    name = re.sub(r"\W+", "-", str(_REPORT.environment["device"]).lower()).strip("-")
    _REPORT.write(config.getoption("--results"), f"{date.today()}-{name}")


def _environment(device):
    facts = {"device": platform.processor() or "cpu"}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts = {"device": found.name, "multiprocessors": found.multi_processor_count, "cuda": torch.version.cuda}
        facts["driver and clocks"] = _output(
            "nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv,noheader"
        )
    return {
        **facts,
        "pyqemb": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
    }


def _output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
