"""Sharded weights, by real processes: ranks that share the weights train the model that one process trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pyqemb
from pyqemb.errors import ConfigError
from pyqemb.testing.tiny import answering_tokenizer, write_tiny_folder
from pyqemb.training import stage2, trainer
from pyqemb.training.config import ParallelSection

NEVER, ALWAYS = ({"shard": -1, "reshard_after_forward": name} for name in ("never", "always"))
SHARDED = {"shard": -1}
RERANK = {"task": "rerank", "base": "answering", "train": {"tokens_per_chunk": 2000}}
# name -> the sharded part of the configuration, and what a single process has too
CASES = {
    "gathered": (NEVER, {}),
    "resharded": (ALWAYS, {}),
    "planned": (SHARDED, {"train": {"memory": "auto"}}),
    "kept graphs": (SHARDED, {"train": {"memory": "auto", "tokens_per_chunk": 4000}}),
    "planned, resharded": (ALWAYS, {"train": {"memory": "auto"}}),
    "LoRA": (SHARDED, {"lora": {"rank": 4}}),
    "LoRA, resharded": (ALWAYS, {"lora": {"rank": 4}}),
    "checkpointing": (SHARDED, {"train": {"activation_checkpointing": True}}),
    "checkpointing, resharded": (ALWAYS, {"train": {"activation_checkpointing": True}}),
    "learned temperature": (SHARDED, {"loss": {"learn_temperature": True, "temperature": 0.05}}),
    "Matryoshka": (SHARDED, {"loss": {"matryoshka": [16, 32]}}),
    "ring": (SHARDED, {"train": {"documents": "ring"}}),
    "fewer texts than ranks": (SHARDED, {"train": {"global_batch_size": 1, "num_negatives": 1}}),
    "fewer texts than ranks, resharded": (ALWAYS, {"train": {"global_batch_size": 1, "num_negatives": 1}}),
    "encoder": (SHARDED, {"base": "bert"}),
    "encoder, planned, resharded": (ALWAYS, {"base": "bert", "train": {"memory": "auto"}}),
    "encoder, LoRA, resharded": (ALWAYS, {"base": "bert", "lora": {"rank": 4}}),
    "encoder, checkpointing": (SHARDED, {"base": "bert", "train": {"activation_checkpointing": True}}),
    "reranker": (SHARDED, RERANK),
    "reranker, tied, resharded": (ALWAYS, {**RERANK, "base": "tied"}),
}
HSDP = {"two by two": ({"shard": 2, "replicate": 2}, {}), "two by two, ring": ({"shard": 2}, CASES["ring"][1])}
# In `make test` on four ranks; `make test-deep` runs all cases there.
OFTEN = (
    "resharded", "planned", "LoRA, resharded", "ring", "fewer texts than ranks, resharded", "reranker",
    "encoder, planned, resharded",
)  # fmt: skip
COUNTED = {f"{kind}, {chunk}": (parallel, {"train": {"tokens_per_chunk": chunk}})
           for kind, parallel in (("gathered", NEVER), ("resharded", ALWAYS)) for chunk in (30, 60)}  # fmt: skip

SCRIPT = """
import json, os, sys
from collections import Counter
import torch, pyqemb
from safetensors.torch import save_file
from pyqemb.training import TrainConfig, trainer
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank, (folder, *files) = int(os.environ["RANK"]), sys.argv[1:]
results = {}

def loop(self):
    real_loop(self)
    tensors = self.optimizer.weights | self.optimizer.extra_parameters
    whole = {name: (x.full_tensor() if hasattr(x, "full_tensor") else x).detach() for name, x in tensors.items()}
    if rank == 0:
        save_file(whole, f"{self.folder}.safetensors")
        results[self.folder.name] = {"counts": counts, "chunks": chunks, "replans": replans}

def train_step(self):
    plan.update(step=self.step, calls=0)
    before = Counter(self.sharding.collectives.counts)
    result = real_step(self)
    counts.append(self.sharding.collectives.counts - before)
    chunks.append(self.cache.last.chunks)
    replans.append(self.cache.last.replans)
    return result

real_loop, real_step = trainer.Run.loop, trainer.Run.train_step
trainer.Run.loop, trainer.Run.train_step = loop, train_step
trainer.Run.save = trainer.Run._write_final = lambda self: None

# An allocation that fails on one rank: at the call `at` of a kind, in the second step.
plan = {}
from pyqemb.model.decoder import Block

def fail(kind):
    if plan.get("kind") == kind and plan["step"] == 1:
        plan["calls"] += 1
        if rank == plan["rank"] and plan["calls"] == plan["at"]:
            raise torch.OutOfMemoryError("injected")

class Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        fail("backward")
        return gradient

def forward(self, x, *rest):
    fail("graph" if torch.is_grad_enabled() else "forward")
    return real_forward(self, Probe.apply(x) if torch.is_grad_enabled() else x, *rest)

real_forward, Block.forward = Block.forward, forward
for file in files:
    counts, chunks, replans = [], [], []
    given = json.load(open(file))
    plan.clear()
    plan.update(given.pop("fails", {}), step=0, calls=0)
    pyqemb.train(TrainConfig(**given))
if rank == 0:
    json.dump(results, open(f"{folder}/results.json", "w"))
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    write_tiny_folder(folder / "base", shards=2)
    write_tiny_folder(folder / "bert", model_type="bert")
    write_tiny_folder(folder / "answering", max_position_embeddings=1024, prefix=True, tie_word_embeddings=False)
    base = write_tiny_folder(folder / "tied", max_position_embeddings=1024, tie_word_embeddings=True)
    answering_tokenizer().save(str(base / "tokenizer.json"))
    generator = torch.Generator().manual_seed(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(40):
            words = [str(n) for n in torch.randint(0, 99, (2 + number % 9,), generator=generator).tolist()]
            negatives = [" ".join(sorted(words)), "7 7", f"{number} {number}"][: number % 4]
            row = {"query": " ".join(words), "positive": " ".join(words[::-1]), "negatives": negatives}
            file.write(json.dumps(row) + "\n")
    return folder


def config(folder, run, parallel, options):
    options = dict(options)
    train = {
        "steps": 4, "global_batch_size": 12, "learning_rate": 1e-4, "epsilon": 1e-4, "num_negatives": 2,
        "tokens_per_chunk": 60, "device": "cpu", "memory": None, **options.pop("train", {}),
    }  # fmt: skip
    return stage2(
        model={"base": str(folder / options.pop("base", "base"))}, data=[{"path": str(folder / "pairs.jsonl")}],
        train=train, parallel=parallel, save={"dir": str(folder / run), "every": None}, **options,
    )  # fmt: skip


def launch(count, folder, cases, fails=None, script=SCRIPT):
    """Run the cases in `count` processes; returns what the steps of each did."""
    (folder / "script.py").write_text(script)
    files = []
    for number, (name, (parallel, options)) in enumerate(cases.items()):
        settings = config(folder, f"{name} {count}", parallel, options).model_dump(mode="json")
        files.append(str(folder / f"{count}_{number}.json"))
        (folder / files[-1]).write_text(json.dumps(settings | ({"fails": fails[name]} if fails else {})))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}",
         str(folder / "script.py"), str(folder), *files],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def alone(workplace):
    """Train in this process; returns the weights of one process, by the options of a case."""
    trained = {}

    def weights(options):
        key = json.dumps(options)
        if key not in trained:
            name = f"alone {len(trained)}"
            run = {}

            def loop(self):
                real(self)
                run.update(self.optimizer.weights | self.optimizer.extra_parameters)

            with pytest.MonkeyPatch.context() as patch:
                real = trainer.Run.loop
                patch.setattr(trainer.Run, "loop", loop)
                pyqemb.train(config(workplace, name, {}, options))
            trained[key] = {name: x.detach().clone() for name, x in run.items()}
        return trained[key]

    return weights


@pytest.fixture(scope="module")
def two(workplace):
    return launch(2, workplace, CASES)


@pytest.fixture(scope="module")
def four(workplace):
    return launch(4, workplace, {name: CASES[name] for name in OFTEN} | HSDP)


def assert_as_alone(workplace, alone, run, options):
    ours, theirs = load_file(workplace / f"{run}.safetensors"), alone(options)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert float((ours[name] - weight).abs().max()) < 1e-6, name


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_what_one_does(workplace, alone, two, name):
    assert_as_alone(workplace, alone, f"{name} 2", CASES[name][1])


@pytest.fixture(scope="module")
def four_seldom(workplace):
    return launch(4, workplace, {name: CASES[name] for name in CASES if name not in OFTEN})


@pytest.mark.parametrize("name", [*OFTEN, *HSDP])
def test_four_ranks_train_what_one_does(workplace, alone, four, name):
    assert_as_alone(workplace, alone, f"{name} 4", (CASES | HSDP)[name][1])


@pytest.mark.deep
@pytest.mark.parametrize("name", [name for name in CASES if name not in OFTEN])
def test_four_ranks_train_the_other_cases_as_one_does(workplace, alone, four_seldom, name):
    assert_as_alone(workplace, alone, f"{name} 4", CASES[name][1])


def test_gathers_do_not_grow_with_chunks(workplace):
    """Tiny models have two blocks: four units of weights with the embedding and the rest."""
    results = launch(2, workplace, COUNTED)
    units = 4
    for name in COUNTED:
        own = results[f"{name} 2"]
        for counts, chunks in zip(own["counts"][1:], own["chunks"][1:], strict=True):  # the first learns the passes
            assert chunks > 2
            assert counts["reduce_scatter"] == units * chunks
            # Resharded, the embedding needs no gathering in the backward pass; the first pass gathers all four.
            gathers = {"gathered": units, "resharded": chunks * (units + 2 * units - 1)}[name.split(",")[0]]
            assert counts["all_gather"] <= gathers, (name, counts, chunks)
    assert results["gathered, 30 2"]["chunks"][1] > results["gathered, 60 2"]["chunks"][1]


@pytest.mark.parametrize(
    "names",
    [
        ("gathered", "LoRA, resharded"),
        pytest.param(("resharded", "planned", "checkpointing"), marks=pytest.mark.deep),
    ],
    ids=", ".join,
)
def test_a_rank_out_of_memory_lets_all_try_again(workplace, alone, names):
    """Whichever pass fails, and whether it holds collectives, graphs or recomputed blocks."""
    cases, fails = {}, {}
    for name in names:
        for kind, at in (("forward", 1), ("graph", 3), ("backward", 2)):
            case = f"{name}, {kind}"
            cases[case], fails[case] = CASES[name], {"kind": kind, "at": at, "rank": 1}
    results = launch(2, workplace, cases, fails)
    for case, (_, options) in cases.items():
        reached = case != "planned, forward"  # all graphs are kept: no pass is without
        assert results[f"{case} 2"]["replans"] == [0, 1 if reached else 0, 0, 0], case
        assert_as_alone(workplace, alone, f"{case} 2", options)


# What the tests above would not see if it did not fail: each of these changes breaks them.
BROKEN = {
    "the divide factor on the root only": """
        from torch.distributed.fsdp import FSDPModule
        factor = FSDPModule.set_gradient_divide_factor
        is_root = lambda self: "Embedder" in str(type(self))
        FSDPModule.set_gradient_divide_factor = lambda self, value: factor(self, value) if is_root(self) else None
    """,
    "no gradients dropped after an error": """
        from pyqemb.training.parallel.sharding import Sharding
        Sharding._abandon = lambda self: self.root.reset_iter_state()
    """,
}


@pytest.mark.deep
@pytest.mark.parametrize("broken", BROKEN)
def test_broken_sharding_is_seen(workplace, alone, broken):
    change = "\n".join(line.strip() for line in BROKEN[broken].strip().splitlines())
    name = "kept graphs"
    launch(2, workplace, {broken: CASES[name]}, {broken: {"kind": "backward", "at": 1, "rank": 1}}, change + SCRIPT)
    with pytest.raises(AssertionError):
        assert_as_alone(workplace, alone, f"{broken} 2", CASES[name][1])


@pytest.mark.deep
@pytest.mark.parametrize("broken", ["no empty chunks", "a retry of one rank alone"])
def test_ranks_that_differ_in_passes_never_finish(workplace, broken):
    change = {
        "no empty chunks": "Sharding.missing = lambda self, count: 0",
        "a retry of one rank alone": "Sharding.most = lambda self, count: count",
    }[broken]
    script = f"from pyqemb.training.parallel.sharding import Sharding\n{change}\n{SCRIPT}".replace(
        'init_process_group("gloo")',
        'init_process_group("gloo", timeout=__import__("datetime").timedelta(seconds=8))',
    )
    with pytest.raises(AssertionError):
        launch(2, workplace, {broken: CASES["resharded"]}, {broken: {"kind": "graph", "at": 1, "rank": 1}}, script)


@pytest.mark.parametrize(
    ("section", "ranks", "mesh"),
    [({}, 4, (4, 1)), ({"shard": -1}, 4, (1, 4)), ({"shard": 2}, 4, (2, 2)), ({"shard": -1, "replicate": 2}, 4, (2, 2)),
     ({"shard": 4, "replicate": 1}, 4, (1, 4)), ({"shard": -1}, 1, (1, 1)), ({}, 1, (1, 1))],
)  # fmt: skip
def test_mesh(section, ranks, mesh):
    assert ParallelSection(**section).mesh(ranks) == mesh


@pytest.mark.parametrize(
    ("section", "ranks", "said"),
    [({"shard": 8}, 1, "parallel.shard is 8: .* the number of ranks: expected 8 .*--nproc-per-node=8.*got 1$"),
     ({"shard": 3}, 4, "parallel.shard is 3: .*, got 4$"),
     ({"shard": 2, "replicate": 4}, 4, "parallel.shard is 2 and parallel.replicate 4.*, got 4$"),
     ({"shard": -1, "replicate": 3}, 4, "parallel.shard is -1 and parallel.replicate 3.*, got 4$")],
)  # fmt: skip
def test_meshes_that_are_not_the_ranks(section, ranks, said):
    with pytest.raises(ConfigError, match=said):
        ParallelSection(**section).mesh(ranks)


@pytest.mark.parametrize("shard", [0, -2, 1.5])
def test_numbers_that_are_no_ranks(shard):
    with pytest.raises(ConfigError, match=r"parallel\.shard"):
        stage2(model={"base": "x"}, data=[{"path": "y"}], parallel={"shard": shard})


def test_a_rank_reads_its_rows_only(workplace, monkeypatch):
    """A model on the meta device, filled in place; a damaged weight is named."""
    whole = pyqemb.Embedder.from_pretrained(workplace / "base")
    empty = pyqemb.Embedder.from_pretrained(workplace / "base", device="meta")
    assert {x.device.type for x in empty.parameters()} == {"meta"}
    empty.to_empty(device="cpu").load_rows(workplace / "base")
    for (name, a), (other, b) in zip(whole.named_parameters(), empty.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    damaged = workplace / "base" / "model-00001-of-00002.safetensors"
    tensors = load_file(damaged)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, damaged, metadata={"format": "pt"})
    with pytest.raises(pyqemb.errors.CheckpointError, match=f"{name} holds NaN"):
        empty.load_rows(workplace / "base")


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="mapped files are read from /proc")
@pytest.mark.parametrize("saves", [True, False])
def test_only_the_rank_that_saves_copies_the_untied_head(workplace, monkeypatch, saves):
    monkeypatch.setattr("pyqemb.model.reranker.is_writer", lambda model: saves)
    empty = pyqemb.Reranker.from_pretrained(workplace / "answering", device="meta")
    assert is_mapped(empty._lm_head)
    empty.to_empty(device="cpu").load_rows(workplace / "answering")
    assert is_mapped(empty._lm_head) is not saves
    whole = pyqemb.Reranker.from_pretrained(workplace / "answering", device="cpu")
    assert not is_mapped(whole._lm_head)
    assert torch.equal(whole._lm_head, empty._lm_head)
    assert torch.equal(whole.head, empty.head)


def is_mapped(tensor):
    """Whether the memory of a tensor is that of a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        region, *_, path = line.split()
        start, end = (int(each, 16) for each in region.split("-"))
        if start <= tensor.data_ptr() < end:
            return path.endswith(".safetensors")
    raise AssertionError("no such memory")
