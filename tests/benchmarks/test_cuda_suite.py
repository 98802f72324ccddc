"""The CUDA benchmarks where there is no GPU: the same code runs on the CPU with tiny sizes, and skips when it
should.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
FAMILIES = {"attention", "loss", "model", "small_ops"}


def suite(*options):
    command = [sys.executable, "-m", "pytest", "benchmarks/cuda", "-o", "python_files=bench_*.py", "-q", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_runs_on_the_cpu(tmp_path):
    done = suite("--device", "cpu", "--tiny", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (table,), (record,) = tmp_path.glob("*.md"), tmp_path.glob("*.json")
    found = json.loads(record.read_text())["measurements"]
    assert {x["family"] for x in found} == FAMILIES
    for x in found:
        assert x["results"]["pyqemb"]["seconds"] > 0
        assert x["case"] in table.read_text()
        differences = [result["difference"] for result in x["results"].values() if result["difference"] is not None]
        assert max(differences) < 0.05, f"{x['case']}: a peer computes something else: {x['results']}"
    needs_gpu = {"torch varlen_attn", "FlexAttention", "flash-attn", "memeff", "Inf-CL"}
    broken = {
        name: note for x in found for name, note in x["notes"].items() if name not in needs_gpu and "SDPA" not in name
    }
    assert not broken


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_skips_without_a_gpu():
    done = suite()
    assert done.returncode == 0
    assert "torch finds no CUDA device" in done.stdout
    assert "passed" not in done.stdout
