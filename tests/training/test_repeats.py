"""A run gives the same bits again, in another process whose memory lies elsewhere."""

import json
import os
import subprocess
import sys

import pytest

from pyqemb.testing.tiny import write_tiny_folder

# Both stages, the second from the model of the first. Between the steps memory is taken and given back at random, so
# that results lie at other addresses in every process.
RUNS = """
import hashlib, json, logging, random, sys
from pathlib import Path
import torch
import pyqemb
from pyqemb.training import stage1, stage2
from safetensors.torch import load_file

folder, steps, seed, threads = Path(sys.argv[1]), *map(int, sys.argv[2:])
logging.disable(logging.INFO)
torch.set_num_threads(threads)
noise, held, losses = random.Random(seed), [], []

def on_step(row):
    losses.append((row["loss"], row["grad_norm"]))
    for _ in range(noise.randrange(6)):
        held.append(torch.full((noise.randrange(1, 1 << noise.randrange(4, 22)),), torch.nan))
    noise.shuffle(held)
    del held[noise.randrange(2, 20) :]

def digest(path):
    sha = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        sha.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()

base = folder / "base"
for number, stage in enumerate((stage1, stage2)):
    place = folder / f"run{seed}_{threads}_{number}"
    lora = {"rank": 2, "dropout": 0.1} if number else None
    result = pyqemb.train(
        stage(
            model={"base": str(base)}, data=[{"path": str(folder / "pairs.jsonl")}], lora=lora,
            train={
                "steps": steps, "global_batch_size": 24, "learning_rate": 1e-3, "num_negatives": number,
                "tokens_per_chunk": 200, "memory": None, "device": "cpu",
            },
            save={"dir": str(place), "every": steps},
        ),
        on_step=on_step,
    )
    base = result.folder
    print(digest(base / "model.safetensors"))
    print(digest(next((place / "checkpoints").iterdir()) / "optimizer.safetensors"))
print(hashlib.sha256(repr(losses).encode()).hexdigest(), len(losses), losses[-1])
"""


def bits(folder, steps, seed, threads):
    done = subprocess.run(
        [sys.executable, "-c", RUNS, folder, str(steps), str(seed), str(threads)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"},
        capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def check_repeats(folder, steps, threads):
    write_tiny_folder(folder / "base")
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(60):
            words = [str(number * 7 % 90 + place * 3 % 11) for place in range(2 + number % 30)]
            row = {"query": " ".join(words[:6]), "positive": " ".join(words[::-1]), "negatives": [" ".join(words[1:])]}
            file.write(json.dumps(row) + "\n")
    first, second = (bits(folder, steps, seed, threads) for seed in (1, 2))
    assert len(first) == 5
    assert f" {2 * steps} " in first[-1]
    assert first == second


@pytest.mark.promise("R14", "5 steps of each stage twice, at 1 and at 2 threads, with allocation noise")
@pytest.mark.parametrize("threads", [1, 2])
def test_two_runs_have_the_same_bits(tmp_path, threads):
    check_repeats(tmp_path, 5, threads)


@pytest.mark.deep
@pytest.mark.promise("R14", "200 steps of each stage twice, at 1 and at 2 threads, with allocation noise")
@pytest.mark.parametrize("threads", [1, 2])
def test_two_runs_of_200_steps_have_the_same_bits(tmp_path, threads):
    check_repeats(tmp_path, 200, threads)
