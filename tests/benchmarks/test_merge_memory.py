"""benchmarks/bench_merge.py on small shapes: a merge holds a few tensors, whatever the size of the models."""

import importlib.util
import sys
from pathlib import Path

import pytest

from pyqemb.testing.tiny import tiny_config

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_merge.py"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_merge_holds_three_tensors(tmp_path):
    spec = importlib.util.spec_from_file_location("bench_merge", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    config = tiny_config(vocab_size=16_000, hidden_size=512, intermediate_size=4096, num_hidden_layers=12)
    found = bench.merge_peak(tmp_path, config, bytes_per_file=40 << 20)
    base = bench.peak_of([sys.executable, "-c", "import pyqemb.cli, pyqemb.merging"])["RssAnon"]
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    own, pieces = found["RssAnon"] - base, 64 << 20  # tensors are combined in pieces of float64
    assert 0.5 * found["largest_tensor"] < own < 3 * found["largest_tensor"] + pieces
    assert own < sum(file.stat().st_size for file in (tmp_path / "merged").glob("*.safetensors"))  # in bfloat16
