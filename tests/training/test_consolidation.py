"""`pyqemb consolidate`: the folder that the run itself writes, from shards, with the memory of a tensor or so."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import pyqemb
from pyqemb.cli import main
from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.model.embedder import Embedder
from pyqemb.model.shard_files import Slice
from pyqemb.testing.tiny import tiny_embedder, write_tiny_folder
from pyqemb.training import stage2, state
from pyqemb.training.state import checkpoints


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def config(folder, **options):
    return stage2(
        model={"base": str(folder / "base"), "instruction": "Find it."}, data=[{"path": str(folder / "pairs.jsonl")}],
        train={"steps": 3, "global_batch_size": 4, "learning_rate": 1e-3, "device": "cpu", "memory": None},
        save={"dir": str(folder / "run"), "every": 1, "keep": 3}, **options,
    )  # fmt: skip


def write_shards(run, model, count, step=3):
    """A checkpoint as `count` ranks write it; training has not touched the weights."""
    folder = run / "checkpoints" / f"step_{step:08}"
    (folder / "portable").mkdir(parents=True)
    values = {"config": config(run.parent).model_dump(mode="json"), "data": "", "random": [], "best": None,
              "bad_steps": 0, "evaluations_since_best": 0, "steps": step}  # fmt: skip
    (folder / "state.json").write_text(json.dumps(values))
    model.write_portable(folder / "portable", torch.bfloat16, {"step": step})
    files = {}
    for number in range(count):
        slices = {}
        for name, weight in model.named_parameters():
            rows = -(-len(weight) // count)
            start = min(number * rows, len(weight))
            slices[name] = Slice(weight.detach()[start : start + rows], start, tuple(weight.shape))
        files |= state.write_shard(folder, number, count, slices, {})
    state.write_manifest(folder, step, count, files)
    return folder


@pytest.fixture
def place(tmp_path):
    write_tiny_folder(tmp_path / "base")
    rows = [{"query": f"q {i}", "positive": f"d {i}", "negatives": [f"n {i}"]} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_the_folder_is_the_one_of_the_run(place, monkeypatch, caplog):
    """Also without the base model; of any step; a damaged checkpoint is passed over."""
    result = pyqemb.train(config(place, loss={"matryoshka": [32, 8]}))
    with pytest.raises(ConfigError, match="run/final: exists already; choose another folder with --out"):
        pyqemb.consolidate(place / "run")
    expected = contents(result.folder)
    (place / "run" / "final").rename(place / "kept")
    (place / "base").rename(place / "gone")
    assert contents(pyqemb.consolidate(place / "run")) == expected
    assert result.folder == place / "run" / "final"
    second = Embedder.from_pretrained(pyqemb.consolidate(place / "run", step=2, out=place / "second"))
    assert json.loads((place / "second" / "pyqemb.json").read_text())["provenance"]["step"] == 2
    assert second.default_instruction == "Find it."
    newest = checkpoints(place / "run" / "checkpoints")[-1]
    (newest / "model.safetensors").write_bytes(b"cut")
    third = pyqemb.consolidate(place / "run", out=place / "third")
    assert f"{newest}/model.safetensors: damaged" in caplog.text
    assert (third / "model.safetensors").read_bytes() == (place / "second" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        pyqemb.consolidate(place / "run", step=3, out=place / "fourth")


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_become_one_file(place, count):
    model = tiny_embedder(seed=3)
    write_shards(place / "run", model, count)
    folder = pyqemb.consolidate(place / "run", out=place / "a" / "name")
    saved = model.save_pretrained(place / "b" / "name", dtype=torch.bfloat16, provenance={"step": 3})
    assert contents(folder) == contents(saved)


def test_what_cannot_be_consolidated(place, capsys):
    assert main(["consolidate", str(place / "run")]) == 3
    assert f"{place}/run: holds no checkpoint of a training run" in capsys.readouterr().err
    folder = write_shards(place / "run", tiny_embedder(), 2)
    assert main(["consolidate", str(place / "run"), "--step", "7"]) == 3
    assert "step_00000007: no such checkpoint; the run has checkpoints of steps 3" in capsys.readouterr().err
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert main(["consolidate", str(place / "run")]) == 3
    error = capsys.readouterr().err
    assert "model-00002-of-00002.safetensors: missing" in error
    assert "holds no intact checkpoint" in error
    assert main(["consolidate", str(place / "run"), "--out", str(place / "base")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert not (place / "run" / "final").exists()


@pytest.mark.parametrize("replaced", [1, 9])
def test_a_run_that_deletes_the_checkpoint_that_is_being_verified(place, monkeypatch, replaced):
    """With save.keep = 1: the next one is taken, unless the run is always faster."""
    folders = [write_shards(place / "run", tiny_embedder(), 1, step=1)]
    real = state.sha256

    def sha256(path):
        if len(folders) <= replaced and folders[-1] in path.parents:
            newer = write_shards(place / "run", tiny_embedder(), 1, step=len(folders) + 1)
            shutil.rmtree(folders[-1])
            folders.append(newer)
        return real(path)

    monkeypatch.setattr(state, "sha256", sha256)
    if replaced > 1:
        with pytest.raises(CheckpointError, match="deletes its checkpoints before they are read"):
            pyqemb.consolidate(place / "run", out=place / "out")
        return
    pyqemb.consolidate(place / "run", out=place / "out")
    assert json.loads((place / "out" / "pyqemb.json").read_text())["provenance"]["step"] == 2


# Consolidates runs, sleeping before each tensor, and says by how much the last one has made its own memory grow.
SCRIPT = """
import sys, threading, time, torch
from pathlib import Path
from pyqemb.model.shard_files import ShardedTensors
from pyqemb.training import consolidate
torch.set_num_threads(1)
pause, *first, run = float(sys.argv[1]), *sys.argv[2:]

def anonymous():
    (line,) = [line for line in Path("/proc/self/status").read_text().split("\\n") if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024

def watch():
    while True:
        peaks.append(anonymous())
        time.sleep(0.0005)

def rows(self, *rest):
    time.sleep(pause)
    return real(self, *rest)

real, ShardedTensors.rows = ShardedTensors.rows, rows
for each in first:
    consolidate(each)
peaks = [anonymous()]
threading.Thread(target=watch, daemon=True).start()
consolidate(run)
print(max(peaks) - peaks[0])
"""


def test_a_killed_process_leaves_nothing_and_the_next_one_starts_anew(place):
    model = tiny_embedder()
    write_shards(place / "run", model, 2)
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, "0.2", str(place / "run")])
    end = time.monotonic() + 120
    while not any(path.stat().st_size > 0 for path in (place / "run").glob(".*.partial.final/model.safetensors")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (place / "run" / "final").exists()
    assert list((place / "run").glob(".*.partial.final"))
    folder = pyqemb.consolidate(place / "run")
    assert contents(folder) == contents(model.save_pretrained(place / "b" / "final", "bfloat16", {"step": 3}))
    assert not list((place / "run").glob(".*.partial.*"))


def test_memory_is_that_of_a_tensor(place):
    """The model has 170 MB of weights, the largest tensor 16 MB. A tiny one goes first and imports everything."""
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=16, head_dim=64)
    model = tiny_embedder(**sizes)
    tensor = max(4 * weight.numel() for weight in model.parameters())
    write_shards(place / "run", model, 2)
    write_shards(place / "first", tiny_embedder(), 2)
    assert sum(4 * weight.numel() for weight in model.parameters()) > 9 * tensor
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "0.002", str(place / "first"), str(place / "run")],
        capture_output=True, text=True, check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},  # what is freed goes back to the system at once
    )  # fmt: skip
    assert int(done.stdout.split()[-1]) < 2.6 * tensor, done.stdout  # float32, bfloat16, the check for NaN
