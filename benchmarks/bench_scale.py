"""Replicas and shards on 1, 2 and 4 ranks of this machine: seconds of a step, memory of a rank as measured and planned.

    python benchmarks/bench_scale.py                    # 200 M parameters in float32 on the CPU, about 20 GB in all
    python benchmarks/bench_scale.py --hidden 256       # smaller
    python benchmarks/bench_scale.py --device cuda      # one rank a GPU, bfloat16, as many ranks as there are GPUs

Memory is the highest resident memory (of a GPU: allocated memory) of the steps over what the process held before the
model was loaded, the largest of the ranks; `planned` is what the dry run says. Ranks of one machine share its cores and
its memory bandwidth: times say what the collectives of a schedule cost, not how training scales over machines.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import torch

KINDS = {
    "replicas": {},
    "shards, gathered once a step": {"shard": -1, "reshard_after_forward": "never"},
    "shards, gathered in every pass": {"shard": -1, "reshard_after_forward": "always"},
    "shards, as planned": {"shard": -1},
}


def write_model(folder: Path, hidden: int, layers: int, vocabulary: int) -> int:
    """A model of Qwen3's proportions with random weights; returns its number of parameters."""
    from pyqemb.model.embedder import Embedder
    from pyqemb.model.families.qwen3 import Qwen3Config
    from pyqemb.testing.tiny import tiny_tokenizer

    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=128,
    )  # fmt: skip
    model = Embedder.from_config(config, tiny_tokenizer())
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def write_pairs(path: Path, rows: int, words: int) -> None:
    """Pairs of texts of random words."""
    generator = torch.Generator().manual_seed(0)
    with path.open("w") as file:
        for _ in range(rows):
            numbers = torch.randint(0, 99, (2, words), generator=generator).tolist()
            query, positive = (" ".join(map(str, side)) for side in numbers)
            file.write(json.dumps({"query": query, "positive": positive}) + "\n")


def work(config_file: str, out: str, steps: int) -> None:
    """One rank: train, then write what was measured."""
    from pyqemb.training import TrainConfig
    from pyqemb.training.grad_cache.memory import PeakMemory
    from pyqemb.training.parallel.layout import rank_memory, units_of
    from pyqemb.training.parallel.world import joined
    from pyqemb.training.signals import StopRequest
    from pyqemb.training.trainer import Run

    import_module("torch.distributed.fsdp")  # what sharding imports is no memory of the model
    torch.set_num_threads(1)
    config = TrainConfig(**json.loads(Path(config_file).read_text()))
    Path(config.save.dir).mkdir(exist_ok=True)
    with StopRequest() as stop, joined(config.train.device, 300) as (world, device):
        place = torch.device(device if device != "auto" else "cpu")
        with PeakMemory(place) as before:
            pass
        start = before._start
        run = Run(config, None, world, device, stop)
        shard = config.parallel.mesh(world.size)[1]
        dtype = run.sharding.dtype if run.sharding else run.model.dtype
        plan = run.cache.planned(run.batches.load(0).stream)
        standing = rank_memory(units_of(run.model), shard, dtype, plan.reshard).standing
        run.train_step()  # makes the moments
        seconds = []
        with PeakMemory(place) as peak:
            held = peak._start - start
            for _ in range(steps):
                world.barrier()
                began = time.perf_counter()
                run.train_step()
                seconds.append(time.perf_counter() - began)
        facts = {
            "seconds": statistics.median(seconds), "memory": held + peak.peak_bytes, "held": held,
            "planned": standing + (plan.peak_bytes or 0), "standing": standing, "reshard": plan.reshard,
        }  # fmt: skip
        everyone = world.gather_object(facts)
        if world.is_first:
            worst = max(everyone, key=lambda each: each["memory"])
            Path(out).write_text(json.dumps(worst | {"seconds": max(each["seconds"] for each in everyone)}))


def measure(folder: Path, ranks: int, parallel: dict, options: argparse.Namespace) -> dict:
    """The measurements of one kind on so many ranks."""
    train = {
        "steps": 100, "global_batch_size": options.batch, "num_negatives": 0, "device": options.device,
        "tokens_per_chunk": options.chunk, "memory": options.memory,
    }  # fmt: skip
    config = {
        "model": {"base": str(folder / "base")}, "data": [{"path": str(folder / "pairs.jsonl")}], "train": train,
        "parallel": parallel, "save": {"dir": str(folder / f"run {time.monotonic_ns()}"), "every": None},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    out = folder / "out.json"
    with suppress(FileNotFoundError):
        out.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, __file__, "--worker", str(folder / "config.json"), str(out), "--steps", str(options.steps)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{ranks} ranks, {parallel}: {done.stderr[-3000:]}")
    return json.loads(out.read_text())


def table(options: argparse.Namespace) -> str:
    """Measure, and return the table."""
    lines = [
        "| ranks | weights | s a step | of replicas | memory a rank, MB | of replicas | planned, MB |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        parameters = write_model(folder / "base", options.hidden, options.layers, options.vocabulary)
        write_pairs(folder / "pairs.jsonl", 4 * options.batch, options.words)
        for ranks in options.ranks:
            replicas = None
            for name, parallel in KINDS.items():
                if ranks == 1 and parallel:
                    continue
                found = measure(folder, ranks, parallel, options)
                replicas = replicas or found
                ratios = [found[key] / replicas[key] for key in ("seconds", "memory")]
                lines.append(
                    f"| {ranks} | {name} | {found['seconds']:.2f} | {ratios[0]:.2f} | {found['memory'] / 1e6:,.0f} | "
                    f"{ratios[1]:.2f} | {found['planned'] / 1e6:,.0f} |"
                )
                print(lines[-1], file=sys.stderr, flush=True)
    return f"{parameters / 1e6:.0f} M parameters\n\n" + "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=12_000)
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--batch", type=int, default=8, help="queries of a step")
    parser.add_argument("--words", type=int, default=12, help="words of a text")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a chunk, at most")
    parser.add_argument("--memory", default="auto", help="train.memory")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker, options.steps)
        return
    if options.ranks is None:
        options.ranks = [n for n in (1, 2, 4, 8) if n <= (torch.cuda.device_count() if options.device == "cuda" else 4)]
    print(table(options))


if __name__ == "__main__":
    main()
