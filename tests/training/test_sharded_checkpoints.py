"""Checkpoints of sharded runs, by real processes: they continue bit by bit on any number of ranks despite faults."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pyqemb
from pyqemb.errors import CheckpointError
from pyqemb.merging.run import _Unrounded
from pyqemb.model.families import FAMILIES
from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import stage2, state, trainer
from pyqemb.training.state import Checkpoint, checkpoints, verify

STEPS = 4
ALONE, SHARDED = {"shard": 1}, {"shard": -1}
LORA = {"lora": {"rank": 4, "dropout": 0.1}}
AVERAGED = {**LORA, "train": {"ema_decay": 0.9}}
FROZEN = {"train": {"freeze": ["embed_tokens", "layers.0.mlp", "norm"], "layer_decay": 0.7, "ema_decay": 0.5}}
ENCODER = {"base": "bert", "train": {"precision": "bfloat16"}}
RERANK = {"task": "rerank", "base": "answering", "train": {"tokens_per_chunk": 2000}}

# Runs, one after the other in the same processes. Each may have a fault in `write_safetensors`: on a rank, at a step.
SCRIPT = """
import errno, json, os, signal, sys, time
import torch, pyqemb
from pyqemb.data.machine import exit_code_of
from pyqemb.training import TrainConfig, state, trainer
torch.set_num_threads(1)
rank = int(os.environ.get("RANK", 0))
folder, given = sys.argv[1], json.loads(sys.argv[2])
if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")

def write_safetensors(path, *rest):
    step = int(path.parent.name.split("_")[-1])
    if fault and step == fault["step"] and rank in fault["ranks"]:
        if fault["kind"] == "kill":
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        if fault["kind"] == "full":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        time.sleep(fault["kind"])
    return real_write(path, *rest)

def train_step(self):
    result = real_step(self)
    pending.append(self.saver._save is not None)
    return result

real_write, real_step = state.write_safetensors, trainer.Run.train_step
state.write_safetensors, trainer.Run.train_step = write_safetensors, train_step

def stop(row):
    if row["step"] == stop_at:
        raise KeyboardInterrupt

results = []
for file, options in given:
    fault, stop_at, pending = options.get("fault"), options.get("stop_at"), []
    try:
        pyqemb.train(TrainConfig(**json.load(open(file))), on_step=stop, resume="auto")
        error, code = None, 0
    except BaseException as caught:
        error, code = f"{type(caught).__name__}: {caught}", exit_code_of(caught)
    results.append({"error": error, "code": code, "pending": pending, "seed": torch.initial_seed()})
json.dump(results, open(f"{folder}/results_{rank}.json", "w"))
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    write_tiny_folder(folder / "base", shards=2)
    write_tiny_folder(folder / "bert", model_type="bert")
    write_tiny_folder(folder / "answering", max_position_embeddings=1024, prefix=True, tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(40):
            words = [str(n) for n in torch.randint(0, 99, (2 + number % 9,), generator=generator).tolist()]
            negatives = [" ".join(sorted(words)), "7 7", f"{number} {number}"][: number % 4]
            row = {"query": " ".join(words), "positive": " ".join(words[::-1]), "negatives": negatives}
            file.write(json.dumps(row) + "\n")
    (folder / "script.py").write_text(SCRIPT)
    return folder


def config(folder, run, parallel=SHARDED, base="base", train=None, save=None, **options):
    defaults = {
        "steps": STEPS, "global_batch_size": 12, "learning_rate": 1e-3, "epsilon": 1e-4, "num_negatives": 2,
        "tokens_per_chunk": 200, "device": "cpu", "memory": None,
    }  # fmt: skip
    return stage2(
        model={"base": str(folder / base)}, data=[{"path": str(folder / "pairs.jsonl")}],
        train={**defaults, **(train or {})}, parallel=parallel,
        save={"dir": str(folder / run), "every": 1, "keep": 2, **(save or {})}, **options,
    )  # fmt: skip


def start(count, folder, *runs):
    """`count` processes that do the runs (a configuration, and what befalls it)."""
    given = []
    for number, (settings, options) in enumerate(runs):
        given.append((f"{settings.save.dir}.{number}.json", options))
        Path(given[-1][0]).write_text(settings.model_dump_json())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if count > 1:
        with socket.create_server(("localhost", 0)) as server:
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1])}
    return [
        subprocess.Popen(
            [sys.executable, str(folder / "script.py"), str(folder), json.dumps(given)], stderr=subprocess.PIPE,
            env=environment | ({"RANK": str(rank), "WORLD_SIZE": str(count)} if count > 1 else {}), text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


def launch(count, folder, *runs):
    """What each rank reports of each run."""
    for process in start(count, folder, *runs):
        _, said = process.communicate(timeout=400)
        assert process.returncode == 0, said[-3000:]
    by_rank = [json.loads((folder / f"results_{rank}.json").read_text()) for rank in range(count)]
    return list(zip(*by_rank, strict=True))


def final(folder, run):
    return load_file(folder / run / "final" / "model.safetensors")


def difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def two(workplace):
    """What two ranks did."""
    plain = {
        "straight": config(workplace, "straight"),
        "narrow": config(workplace, "narrow", train={"precision": "bfloat16"}),
        "lora": config(workplace, "lora", train={"precision": "bfloat16"}, **LORA),
        "rerank": config(workplace, "rerank", **RERANK),
        "encoder": config(workplace, "encoder", **ENCODER),
        "frozen": config(workplace, "frozen", **FROZEN),
        "back": config(workplace, "back", save={"background": True}),
    }
    runs = [
        *((settings, {}) for name, settings in plain.items() if name != "back"),
        (plain["back"], {"fault": {"step": 2, "ranks": [0, 1], "kind": 0.5}}),
        (config(workplace, "sizes"), {"stop_at": 2}),
        (config(workplace, "again", **AVERAGED), {"stop_at": 2}),
        (config(workplace, "again", **AVERAGED), {}),
        (config(workplace, "again straight", **AVERAGED), {}),
        *(
            (config(workplace, f"full {rank}, {back}", save={"background": back}),
             {"fault": {"step": 3, "ranks": [rank], "kind": "full"}})
            for rank in (0, 1) for back in (False, True)
        ),
    ]  # fmt: skip
    names = [Path(settings.save.dir).name for settings, _ in runs]
    return dict(zip(names, launch(2, workplace, *runs), strict=True))


def test_runs_are_saved(workplace, two):
    for name in ("straight", "narrow", "lora", "rerank", "encoder", "frozen", "back", "again", "again straight"):
        assert [report["error"] for report in two[name]] == [None, None]
        found = checkpoints(workplace / name / "checkpoints")
        assert [path.name for path in found] == [f"step_{STEPS - 1:08}", f"step_{STEPS:08}"]
        assert not list((workplace / name / "checkpoints").glob(".*"))
        for path in found:
            assert {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)} < {each.name for each in path.iterdir()}
    shards = [load_file(checkpoints(workplace / "straight" / "checkpoints")[-1] / f"model-0000{n}-of-00002.safetensors")
              for n in (1, 2)]  # fmt: skip
    assert all(len(one) == len(other) for one, other in zip(shards[0].values(), shards[1].values(), strict=True))


def test_a_resumed_run_is_bit_equal_at_the_same_size(workplace, two):
    assert two["again"][0]["pending"] == [False] * 2
    assert contents(workplace / "again" / "final") == contents(workplace / "again straight" / "final")
    one, other = (checkpoints(workplace / name / "checkpoints")[-1] for name in ("again", "again straight"))
    saved = Checkpoint.load(one)
    assert {f"{name}/ema" for name in saved.weights} < set(saved.optimizer)
    assert {k: v for k, v in contents(one).items() if "optimizer" in k} == {
        k: v for k, v in contents(other).items() if "optimizer" in k
    }


def test_each_rank_draws_its_own_dropout_masks(two):
    assert [report["seed"] for report in two["lora"]] == [0, 1]
    assert [report["seed"] for report in two["straight"]] == [0, 0]


@pytest.mark.promise("R7", "1, 2 and 4 ranks")
def test_a_run_goes_on_with_other_numbers_of_ranks(workplace, two):
    assert [report["error"].split(":")[0] for report in two["sizes"]] == ["KeyboardInterrupt", "RankError"]
    shutil.copytree(workplace / "again" / "checkpoints", workplace / "masks" / "checkpoints")
    runs = [(config(workplace, "masks", **AVERAGED), {}), (config(workplace, "sizes"), {"stop_at": 3})]
    masks, reports = launch(4, workplace, *runs)
    assert [report["seed"] for report in masks] == [0, 1, 2, 3]
    assert reports[0]["error"].startswith("KeyboardInterrupt")
    (again,) = launch(1, workplace, (config(workplace, "sizes", ALONE), {}))
    assert again[0]["pending"] == [False]
    (straight,) = launch(1, workplace, (config(workplace, "alone", ALONE), {}))
    assert straight[0]["error"] is None
    assert difference(final(workplace, "sizes"), final(workplace, "alone")) < 1e-6
    assert (
        difference(
            final(workplace, "sizes"),
            load_file(workplace / "base" / "model-00001-of-00002.safetensors")
            | load_file(workplace / "base" / "model-00002-of-00002.safetensors"),
        )
        > 1e-4
    )


@pytest.mark.parametrize("name", ["straight", "narrow", "lora", "rerank", "encoder", "frozen"])
def test_the_folder_is_that_of_an_unsharded_run(workplace, two, name):
    """Byte by byte, where one rank starts from the same weights."""
    options = {"narrow": {"train": {"precision": "bfloat16"}}, "rerank": RERANK, "encoder": ENCODER, "frozen": FROZEN,
               "lora": {"train": {"precision": "bfloat16"}, **LORA}}.get(name, {})  # fmt: skip
    copy = workplace / f"{name} alone"
    shutil.copytree(workplace / name / "checkpoints", copy / "checkpoints")
    (report,) = launch(1, workplace, (config(workplace, copy.name, ALONE, **options), {}))
    assert report[0]["error"] is None
    for folder in ("final", *(["adapter"] if name == "lora" else [])):
        assert contents(copy / folder) == contents(workplace / name / folder)


def test_frozen_weights_rates_by_layer_and_averages_are_those_of_one_rank(workplace, two):
    """The embeddings, a part of a layer and the final norm are frozen: a whole unit of FSDP, and parts of two."""
    (report,) = launch(1, workplace, (config(workplace, "frozen, one rank", ALONE, **FROZEN), {}))
    assert report[0]["error"] is None
    sharded, alone = (final(workplace, name) for name in ("frozen", "frozen, one rank"))
    assert difference(sharded, alone) < 1e-6
    parts = [load_file(workplace / "base" / f"model-0000{n}-of-00002.safetensors") for n in (1, 2)]
    before = parts[0] | parts[1]
    same = {name for name in before if torch.equal(sharded[name], before[name])}
    mlp = {f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert same == {"embed_tokens.weight", "norm.weight", *mlp}
    saved = Checkpoint.load(checkpoints(workplace / "frozen" / "checkpoints")[-1])
    assert {name.removeprefix("model.") for name in saved.weights} == before.keys() - same


@pytest.mark.promise("R6", "a sharded run of two ranks")
def test_background_saving_writes_the_same(workplace, two):
    assert any(two["back"][0]["pending"])
    assert not any(two["straight"][0]["pending"])
    for step in (STEPS - 1, STEPS):
        one, other = (contents(workplace / name / "checkpoints" / f"step_{step:08}") for name in ("back", "straight"))
        same = [name for name in one if name.endswith(".safetensors") or name.startswith("portable/")]
        assert len(same) > 8
        assert {name: one[name] for name in same} == {name: other[name] for name in same}
    assert contents(workplace / "back" / "final") == contents(workplace / "straight" / "final")


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_exception_waits_for_the_checkpoint_that_is_being_written(workplace, monkeypatch, error):
    settings = config(workplace, f"waits {error.__name__}", ALONE, save={"background": True, "every": 2})
    real_write, real_step = state.write_safetensors, trainer.Run.train_step

    def write(*args):
        time.sleep(1)
        return real_write(*args)

    def train_step(self):
        if self.step == 2:
            assert self.saver.poll() is None
            raise error
        return real_step(self)

    monkeypatch.setattr(state, "write_safetensors", write)
    monkeypatch.setattr(trainer.Run, "train_step", train_step)
    with pytest.raises(error):
        pyqemb.train(settings)
    (path,) = (workplace / settings.save.dir / "checkpoints").iterdir()
    assert verify(path) == 2


@pytest.mark.promise("R4", "one of two ranks")
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_rank_is_an_error_of_all(workplace, two, rank, back):
    name = f"full {rank}, {back}"
    reports = two[name]
    assert [report["code"] for report in reports] == [74, 74]
    path = workplace / name / "checkpoints" / "step_00000003"
    words = f"MachineError: {path}: could not be written: No space left on device; older checkpoints are intact"
    assert reports[rank]["error"] == words
    assert reports[1 - rank]["error"] == f"RankError: rank {rank} failed with {words}"
    assert [verify(each) for each in checkpoints(path.parent)] == [1, 2]
    assert not list(path.parent.glob(".*"))


@pytest.mark.promise("R5", "a flipped bit, a cut and a loss of each file of two ranks")
def test_every_damage_is_named_and_the_checkpoint_before_is_taken(workplace, two, caplog):
    newest, before = checkpoints(workplace / "straight" / "checkpoints")[::-1]
    copy = workplace / "damaged"
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        name, whole = str(path.relative_to(newest)), path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 4
        for damage in (bytes(flipped), whole[:-1], None):
            target = copy / newest.name
            shutil.copytree(newest, target)
            (target / name).unlink() if damage is None else (target / name).write_bytes(damage)
            with pytest.raises(CheckpointError, match=path.name):
                verify(target)
            shutil.rmtree(copy)
    place = workplace / "damaged run"
    shutil.copytree(workplace / "straight" / "checkpoints", place / "checkpoints")
    (place / "checkpoints" / newest.name / "optimizer-00002-of-00002.safetensors").unlink()
    pyqemb.train(config(workplace, place.name, ALONE), resume="auto")
    assert f"{newest.name}/optimizer-00002-of-00002.safetensors: missing" in caplog.text
    assert difference(final(workplace, place.name), final(workplace, "straight")) < 1e-6
    assert verify(before) == STEPS - 1


def test_rows_that_are_in_no_shard_are_named(workplace, two):
    newest = checkpoints(workplace / "straight" / "checkpoints")[-1]
    loaded = Checkpoint.load(newest)
    name = "model.embed_tokens.weight"
    whole = loaded.weights[name]
    for rows in (slice(0, 5), slice(3, 250), slice(200, 384), slice(7, 7)):
        assert torch.equal(loaded.weights.rows(name, rows), whole[rows])
    with pytest.raises(CheckpointError, match=r"has \d+ rows, found 0\.\.\d+ in model-00001"):
        type(loaded.weights)([newest / "model-00001-of-00002.safetensors"])


@pytest.mark.promise("R2", "one of two ranks killed in a save")
def test_a_rank_killed_in_the_middle_of_a_save_costs_nothing_else(workplace, two):
    """Neither in the checkpoints before, nor in the bits of the run that goes on."""
    settings = config(workplace, "killed")
    processes = start(2, workplace, (settings, {"fault": {"step": 3, "ranks": [1], "kind": "kill"}}))
    codes = [(process.communicate(timeout=200), process.returncode)[1] for process in processes]
    assert codes[1] == -signal.SIGKILL
    assert [verify(path) for path in checkpoints(workplace / "killed" / "checkpoints")] == [1, 2]
    assert [report["error"] for report in launch(2, workplace, (settings, {}))[0]] == [None, None]
    assert contents(workplace / "killed" / "final") == contents(workplace / "straight" / "final")
    assert not list((workplace / "killed" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("name", ["straight", "narrow", "lora", "rerank", "encoder", "frozen"])
def test_consolidating_gives_the_folder_that_the_run_wrote(workplace, two, name, monkeypatch):
    if name in ("straight", "narrow"):
        monkeypatch.delattr("pyqemb.training.consolidation.local_folder")  # the base model is not wanted
    folder = pyqemb.consolidate(workplace / name, out=workplace / "consolidated" / name / "final")
    assert contents(folder) == contents(workplace / name / "final")


def test_merging_reads_the_exact_weights_of_shards(workplace, two):
    for place in ("one", "other"):
        shutil.copytree(workplace / "narrow" / "checkpoints", workplace / place / "checkpoints")
        shutil.copytree(workplace / "narrow" / "final", workplace / place / "final")
    (newest,) = checkpoints(workplace / "one" / "checkpoints")[-1:]
    exact = Checkpoint.load(newest).weights
    rounded = _Unrounded(workplace / "one" / "final", (), FAMILIES["qwen3"])
    assert all(torch.equal(rounded[name], exact[f"model.{name}"]) for name in rounded)
    assert {rounded[name].dtype for name in rounded} == {torch.float32}
    (newest / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"found .* in model-00002-of-00002"):
        pyqemb.merge([workplace / "one" / "final", workplace / "other" / "final"], out=workplace / "merged")
