"""Collects the comparisons of a run, prints one table and writes it to benchmarks/results/."""

import platform
from datetime import date
from pathlib import Path

import pytest
import torch

from pyqemb import _C
from pyqemb.testing.bench import HEADER, versus

_ROWS = []


@pytest.fixture
def compare(benchmark):
    """versus(...), recorded: the table's rows. pytest-benchmark times our side once more for its own report."""

    def run(name, peer, ours, theirs, rounds=7, gflop=0.0):
        comparison = versus(name, peer, ours, theirs, rounds, gflop)
        _ROWS.append(comparison)
        benchmark.extra_info.update(peer=peer, ratio=comparison.ratio)
        benchmark.pedantic(ours, rounds=1)
        return comparison

    return run


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def pytest_terminal_summary(terminalreporter):
    if not _ROWS:
        return
    device = f"{_processor()}, {_C.current_isa()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    table = "\n".join([HEADER, *(row.row() for row in _ROWS)])
    terminalreporter.write_line(f"\n{device}\n{table}")
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"{date.today()}-cpu.md").write_text(f"`make bench`, {device}; medians, interleaved.\n\n{table}\n")
