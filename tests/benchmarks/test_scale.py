"""The memory of a rank is what the planner predicts, and shards take a fraction of what replicas take."""

import argparse
import runpy
from pathlib import Path

import pytest

bench = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "bench_scale.py"))
# Beside the model: what gloo, the allocator and Python take in a run.
CONSTANT = 100e6


def measured(folder, ranks, kinds, hidden, layers):
    options = argparse.Namespace(batch=4, chunk=64, device="cpu", memory="auto", steps=2)
    bench["write_model"](folder / "base", hidden, layers, 12_000)
    bench["write_pairs"](folder / "pairs.jsonl", 16, 6)
    return [bench["measure"](folder, ranks, bench["KINDS"][kind], options) for kind in kinds]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "shards, gathered in every pass",
        pytest.param("shards, gathered once a step", marks=pytest.mark.deep),
        pytest.param("replicas", marks=pytest.mark.deep),
    ],
)
def test_memory_is_as_planned(tmp_path, kind):
    (found,) = measured(tmp_path, 2, [kind], 512, 8)
    assert abs(found["memory"] - found["planned"]) < 0.15 * found["planned"] + CONSTANT, found
    assert found["reshard"] == (kind == "shards, gathered in every pass")


@pytest.mark.deep
def test_200_million_parameters_on_four_ranks(tmp_path):
    """About 20 GB in all."""
    replicas, shards = measured(tmp_path, 4, ["replicas", "shards, gathered in every pass"], 1024, 12)
    assert abs(shards["memory"] - shards["planned"]) < 0.15 * shards["planned"], shards
    assert shards["memory"] < 0.35 * replicas["memory"], (shards, replicas)
