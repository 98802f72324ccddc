"""`pyqemb train --dry-run --world N`: what the ranks of a run would hold and send, against what they do."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from pyqemb.cli import main
from pyqemb.data.batch import PackedBatch
from pyqemb.model.checkpoint import Tensors
from pyqemb.model.embedder import Embedder
from pyqemb.model.lora import LoraConfig, add_lora
from pyqemb.testing.hollow import write_hollow_folder
from pyqemb.testing.tiny import tiny_config, tiny_embedder
from pyqemb.training.config import ParallelSection, TrainConfig
from pyqemb.training.grad_cache import GradCache
from pyqemb.training.parallel.layout import rank_memory, units_of
from pyqemb.training.parallel.sharding import Sharding, make_mesh
from pyqemb.training.parallel.world import World
from pyqemb.training.preflight import in_units
from pyqemb.training.rank_plan import RankPlanner, Ranks


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A run on a base of 343 M parameters, of whose weights nothing is there."""
    place = tmp_path_factory.mktemp("ranks")
    config = tiny_config(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=6, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=20_000,
    )  # fmt: skip
    write_hollow_folder(place / "base", config)
    row = {"query": "q " * 10, "positive": "p " * 40, "negatives": ["n " * 40]}
    with (place / "pairs.jsonl").open("w") as file:
        for number in range(64):
            file.write(json.dumps({**row, "query": f"{number} {row['query']}"}) + "\n")
    (place / "run.toml").write_text(f"""
[model]
base = "{place / "base"}"
[[data]]
path = "{place / "pairs.jsonl"}"
[save]
dir = "{place / "run"}"
""")
    return place


@pytest.fixture
def dry_run(workplace, capsys, monkeypatch):
    """Run the command; returns its exit code and what it printed, as (standard output, standard error)."""

    def read(*_):
        raise AssertionError("a weight was read")

    def run(*arguments, **settings):
        monkeypatch.setattr(Tensors, "_read", read)
        pairs = [part for key, value in settings.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]
        code = main(["train", str(workplace / "run.toml"), *arguments, *pairs])
        return code, *capsys.readouterr()

    return run


def test_the_plan_of_ranks_without_their_weights(workplace, dry_run):
    code, out, err = dry_run("--dry-run", "--world", "16", "--gpu-memory", "6GB", parallel__shard=8)
    assert code == 0, err
    units = units_of(Embedder.from_pretrained(workplace / "base", device="meta"))
    memory = rank_memory(units, 8, torch.bfloat16)
    parameters = sum(x.numel() for unit in units for x in unit)
    assert f"{parameters / 1e6:.2f} M parameters" in out
    assert "device     cuda, bfloat16" in out
    assert "ranks      16: 2 replicas of 8 shards, 6.00 GB each" in out
    assert f"between steps: weights {in_units(memory.weights)}, moments {in_units(memory.moments)}" in out
    assert f"gathered weights {in_units(2 * parameters)}, " in out
    assert "collective all-gathers of weights: 8 a step" in out
    assert "collective all-reduces of gradients: 1 a step" in out
    assert f"checkpoint {in_units(12 * parameters)}, " in out
    line = out[out.index("at most, in the") :].splitlines()[0]
    kinds = [float(size) * {"G": 1, "M": 1e-3}[unit] for size, unit in re.findall(r"([\d.]+) ([GM])B", line)]
    assert sum(kinds) == pytest.approx(float(re.search(r"([\d.]+) GB at most", out)[1]), abs=0.02)
    assert not (workplace / "run").exists()


def test_what_does_not_fit_is_refused_with_what_would(dry_run):
    code, out, err = dry_run("--dry-run", "--world", "8", "--gpu-memory", "6GB")
    assert code == 2
    assert not out
    needed, given = re.search(r"a rank needs ([\d.]+) GB and has ([\d.]+) GB", err).groups()
    assert float(needed) > float(given) == 6
    assert "[lora] adapters" in err
    shard = re.search(r"parallel.shard = (\d+) fits", err)[1]
    assert dry_run("--dry-run", "--world", "8", "--gpu-memory", "6GB", parallel__shard=shard)[0] == 0
    code, _, err = dry_run("--dry-run", "--world", "8", "--gpu-memory", "6GB", lora="{}")
    assert code == 0, err
    code, _, err = dry_run("--dry-run", "--world", "2", "--gpu-memory", "2GB")
    assert code == 2
    world = re.search(r"parallel.shard = (\d+) on \1 ranks fits", err)[1]
    assert int(world) > 2
    assert dry_run("--dry-run", "--world", world, "--gpu-memory", "2GB", parallel__shard=world)[0] == 0


def test_config_and_tokenizer_suffice(workplace, dry_run):
    """Weights of several GB need not be there to plan for them."""
    (workplace / "base" / "model.safetensors").rename(workplace / "elsewhere")
    try:
        code, out, err = dry_run("--dry-run", "--world", "16", "--gpu-memory", "6GB", parallel__shard=8)
    finally:
        (workplace / "elsewhere").rename(workplace / "base" / "model.safetensors")
    assert code == 0, err
    assert " M parameters, causal" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world", "2", "--gpu-memory", "6GB"], "they need --dry-run"),
        (["--dry-run", "--world", "2"], "give both"),
        (["--dry-run", "--gpu-memory", "6GB"], "give both"),
        (["--dry-run", "--world", "0", "--gpu-memory", "6GB"], "--world: expected 1 to 1000000 ranks, got 0"),
        (["--dry-run", "--world", "99999999999", "--gpu-memory", "6GB"], "1000000 ranks, got 99999999999"),
        (["--dry-run", "--world", "2", "--gpu-memory", "9" * 400 + "TB"], "expected less than 2**63 bytes"),
        (["--dry-run", "--world", "2", "--gpu-memory", "..GB"], "expected a size like '80GB', got '..GB'"),
        (["--dry-run", "--world", "2", "--gpu-memory", "24"], "--gpu-memory: expected a size like '80GB', got '24'"),
        (["--dry-run", "--world", "2", "--gpu-memory", "0GB"], "--gpu-memory: expected at least one byte"),
        (
            ["--dry-run", "--world", "6", "--gpu-memory", "6GB", "--set", "parallel.shard=4"],
            "shard x replicate must be the number of ranks",
        ),
    ],
)
def test_ranks_that_make_no_plan_are_refused(dry_run, arguments, message):
    code, _, err = dry_run(*arguments)
    assert code == 2
    assert message in err


def planner(model, lengths, dtype=torch.float32, **train):
    config = TrainConfig(model={"base": "none"}, data=[{"path": "none"}], train={"device": "cpu", **train})
    texts = len(lengths)
    return RankPlanner(config, model, dtype, "cpu", lambda ranks: np.sort(lengths)[: texts // ranks], texts)


@pytest.fixture
def four_ranks():
    """A process group of four ranks, of which only this one runs."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield World(0, 4)
    dist.destroy_process_group()


@pytest.mark.parametrize("reshard", ["never", "always"])
@pytest.mark.parametrize("lora", [False, True])
def test_peak_and_collectives_are_those_of_a_step(four_ranks, lora, reshard):
    def model():
        model = tiny_embedder(num_hidden_layers=3)
        if lora:
            model.requires_grad_(False)
            add_lora(model.model, LoraConfig(rank=4))
        return model

    lengths = np.full(24, 10)
    parallel = ParallelSection(shard=4, reshard_after_forward=reshard)
    planned = planner(model().to("meta"), lengths, memory=None, tokens_per_chunk=20).plan(Ranks(4, 1 << 30), parallel)
    assert len(planned.tokens) == 3
    sharded = model()
    mesh = make_mesh(parallel, four_ranks, torch.device("cpu"))
    sharding = Sharding(sharded, mesh, torch.float32, four_ranks, reshard)
    cache = GradCache(sharded, None, 20, ranks=sharding)
    stream = PackedBatch.pack([[*range(first, first + 10)] for first in range(0, 60, 10)])
    live = cache.planned(stream)
    assert live.reshard == planned.plan.reshard == (reshard == "always")
    assert planned.plan.peak_bytes == pytest.approx(live.peak_bytes, rel=0.05)
    cache.step_stream(stream, lambda vectors: vectors.sum())  # the first has passes over nothing besides
    before = dict(sharding.collectives.counts)
    sent = Counter()

    def counting(kind, run):
        def call(output, given, *arguments, **options):
            sent[kind] += max(output.nbytes, given.nbytes)
            return run(output, given, *arguments, **options)

        return call

    for kind in ("all_gather", "reduce_scatter"):
        comm = getattr(sharding.collectives, kind)
        comm._run = counting(kind, comm._run)
    cache.step_stream(stream, lambda vectors: vectors.sum())
    for kind, traffic in zip(("all_gather", "reduce_scatter"), planned.traffic, strict=False):
        assert sharding.collectives.counts[kind] - before.get(kind, 0) == traffic.number
        assert sent[kind] == pytest.approx(traffic.nbytes, rel=0.05)  # rows are rounded up
