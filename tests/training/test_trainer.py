"""Whole runs on a tiny model: they learn, stop, continue bit by bit, and survive damage, kills and full disks."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import pyqemb
from pyqemb.data.sealed import unseal
from pyqemb.errors import CheckpointError, ConfigError, Interrupted, PyqembError
from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import stage2
from pyqemb.training.state import checkpoints, step_of, verify, write_manifest


@pytest.fixture
def workplace(tmp_path):
    write_tiny_folder(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for _ in range(64):
            words = [str(n) for n in torch.randint(0, 99, (6,), generator=generator).tolist()]
            row = {
                "query": " ".join(words),
                "positive": " ".join(words[::-1]),
                "negatives": [" ".join(sorted(words)), "7 7"],
            }
            file.write(json.dumps(row) + "\n")
    return tmp_path


def config(folder, run="run", **train):
    defaults = {
        "steps": 12,
        "global_batch_size": 16,
        "learning_rate": 3e-3,
        "num_negatives": 1,
        "tokens_per_chunk": 200,
    }
    return stage2(
        model={"base": str(folder / "base")}, data=[{"path": str(folder / "pairs.jsonl")}],
        train={**defaults, **train}, save={"dir": str(folder / run), "every": 3, "keep": 2},
    )  # fmt: skip


def weights(folder):
    return load_file(folder / "final" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_learns_and_writes_everything(workplace):
    steps = []
    result = pyqemb.train(config(workplace, steps=30), on_step=steps.append)
    losses = [row["loss"] for row in steps]
    assert result.steps == 30
    assert losses[-1] < losses[0] / 2
    assert [json.loads(line)["step"] for line in (workplace / "run" / "metrics.jsonl").open()] == list(range(1, 31))
    assert {"config.resolved.json", "env.json", "final", "checkpoints"} <= {
        p.name for p in result.folder.parent.iterdir()
    }
    assert [path.name for path in checkpoints(workplace / "run" / "checkpoints")] == ["step_00000027", "step_00000030"]
    model = pyqemb.Embedder.from_pretrained(result.folder)
    similarity = model.encode(["1 2 3 4 5 6"]) @ model.encode(["6 5 4 3 2 1", "50 51"]).T
    assert similarity[0, 0] > similarity[0, 1]


def test_chunks_do_not_change_the_run(workplace):
    losses = []
    for tokens in (30, 10**6):
        rows = []
        pyqemb.train(config(workplace, f"run{tokens}", tokens_per_chunk=tokens), on_step=rows.append)
        losses.append([row["loss"] for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_bfloat16_learns_like_float32(workplace):
    losses = {}
    for precision in ("float32", "bfloat16"):
        rows = []
        result = pyqemb.train(config(workplace, precision, steps=30, precision=precision), on_step=rows.append)
        losses[precision] = torch.tensor([row["loss"] for row in rows])
    assert losses["float32"][-1] < losses["float32"][0] / 2
    assert (losses["bfloat16"] - losses["float32"]).abs().mean() < 0.03 * losses["float32"][0]
    final = weights(workplace / "bfloat16")
    exact = load_file(result.folder.parent / "checkpoints" / "step_00000030" / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in exact.values())
    assert same(final, {name.removeprefix("model."): tensor.bfloat16() for name, tensor in exact.items()})


@pytest.mark.promise("R1", "stopped three times in 12 steps, float32 and bfloat16")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumed_runs_are_bit_identical(workplace, precision):
    pyqemb.train(config(workplace, "straight", precision=precision))

    class StopTrainingError(Exception):
        pass

    def stop_at(step):
        def on_step(row):
            if row["step"] == step:
                raise StopTrainingError

        return on_step

    for step in (4, 8, 11):  # stopped three times, each after the last checkpoint
        with pytest.raises(StopTrainingError):
            pyqemb.train(config(workplace, "stopped", precision=precision), on_step=stop_at(step), resume="auto")
    pyqemb.train(config(workplace, "stopped", precision=precision), resume="auto")
    assert same(weights(workplace / "straight"), weights(workplace / "stopped"))

    def losses(run):
        return [(row["step"], row["loss"]) for row in map(json.loads, (workplace / run / "metrics.jsonl").open())]

    assert losses("straight") == losses("stopped")


@pytest.mark.promise("R1", "interrupted between a save and the removal of the checkpoints of an abandoned branch")
def test_a_run_continues_on_the_branch_of_its_last_save(workplace, monkeypatch):
    """Resumed from an older step, with other checkpoints than before, and interrupted in its first save."""

    def branch(every, **train):
        chosen = config(workplace, **{"steps": 9, **train})
        return stage2(**{**chosen.model_dump(exclude_unset=True), "save": {**chosen.save.model_dump(), **every}})

    def steps():
        return [step_of(path) for path in checkpoints(workplace / "run" / "checkpoints")]

    class KilledError(Exception):
        pass

    def killed(*_):
        raise KilledError

    pyqemb.train(branch({"every": 2, "keep": 9}))
    assert steps() == [2, 4, 6, 8, 9]
    older = workplace / "run" / "checkpoints" / "step_00000002"
    with monkeypatch.context() as patch:
        patch.setattr("pyqemb.training.state.retain", killed)
        with pytest.raises(KilledError):
            pyqemb.train(branch({"every": 5, "keep": 9}, steps=10), resume=older)
    assert steps() == [2, 5]
    rows = []
    pyqemb.train(branch({"every": 5, "keep": 9}, steps=10), resume="auto", on_step=rows.append)
    assert [row["step"] for row in rows] == [6, 7, 8, 9, 10]
    assert steps() == [2, 5, 10]


def test_best_checkpoint_is_kept(workplace):
    scores = iter([0.1, 0.9, 0.5, 0.3])
    chosen = stage2(**{**config(workplace).model_dump(exclude_unset=True), "eval": {"every": 4, "metric": "score"}})
    result = pyqemb.train(chosen, evaluate=lambda model: {"other": 5.0, "score": next(scores)})
    assert result.best is not None
    assert json.loads((result.best / "pyqemb.json").read_text())["provenance"]["step"] == 8
    wrong = stage2(**{**config(workplace, "wrong").model_dump(exclude_unset=True), "eval": {"metric": "none"}})
    with pytest.raises(ConfigError, match="'none' is not among the measured metrics: score"):
        pyqemb.train(wrong, evaluate=lambda model: {"score": 1.0})


@pytest.mark.promise("R5", "a flipped bit and a cut in each file")
def test_damaged_checkpoints_are_named_and_passed_over(workplace, caplog):
    pyqemb.train(config(workplace))
    newest, previous = checkpoints(workplace / "run" / "checkpoints")[::-1]
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
        path = newest / name
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 4
        for damaged in (bytes(flipped), whole[:-1]):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=name):
                verify(newest)
        path.write_bytes(whole)
    (newest / "model.safetensors").write_bytes(b"cut")
    pyqemb.train(config(workplace), resume="auto")
    assert str(newest / "model.safetensors") in caplog.text
    assert verify(previous) or True


def test_a_run_is_not_overwritten_or_mixed(workplace):
    pyqemb.train(config(workplace))
    with pytest.raises(ConfigError, match="earlier run left checkpoints"):
        pyqemb.train(config(workplace))
    with pytest.raises(ConfigError, match=r"train\.learning_rate was 0\.003, now 0\.1"):
        pyqemb.train(config(workplace, learning_rate=0.1), resume="auto")
    with (workplace / "pairs.jsonl").open("a") as file:
        file.write('{"query": "a", "positive": "b"}\n')
    with pytest.raises(ConfigError, match="training data are not those"):
        pyqemb.train(config(workplace), resume="auto")
    with pytest.raises(CheckpointError, match="holds no intact checkpoint"):
        pyqemb.train(config(workplace), resume=workplace / "base")


@pytest.mark.promise("R24", "two losses of NaN in six steps")
def test_steps_that_are_not_finite_change_nothing(workplace, monkeypatch):
    from pyqemb.training.objectives.info_nce import InfoNCE

    real = InfoNCE.loss
    calls = []

    def sometimes_nan(self, *args):
        calls.append(None)
        part = real(self, *args)
        return part._replace(loss=part.loss * torch.nan) if len(calls) in (3, 4) else part

    monkeypatch.setattr(InfoNCE, "loss", sometimes_nan)
    rows = []
    pyqemb.train(config(workplace, steps=6), on_step=rows.append)
    assert [row["loss"] is None for row in rows] == [False, False, True, True, False, False]
    assert all(torch.isfinite(tensor).all() for tensor in weights(workplace / "run").values())
    calls.clear()
    with pytest.raises(PyqembError, match="2 steps in a row"):
        pyqemb.train(config(workplace, "stopping", steps=6, max_bad_steps=2))


@pytest.mark.parametrize("patience", [None, 1])
def test_a_run_whose_steps_were_all_left_out_gives_no_model(workplace, monkeypatch, patience):
    from pyqemb.training.objectives.info_nce import InfoNCE

    real = InfoNCE.loss

    def nan(self, *args):
        part = real(self, *args)
        return part._replace(loss=part.loss * torch.nan)

    monkeypatch.setattr(InfoNCE, "loss", nan)
    settings = config(workplace, steps=4).model_dump()
    if patience:
        settings |= {"eval": {"every": 1, "patience": 1}}
    with pytest.raises(
        PyqembError, match=r"steps in a row that were not finite|none of the 2 steps was finite"
    ) as caught:
        pyqemb.train(stage2(**settings), evaluate=(lambda model: {"score": 1.0}) if patience else None)
    assert caught.value.exit_code != 0
    assert not (workplace / "run" / "final").exists()


def test_a_signal_before_the_first_step_says_that_nothing_is_lost(workplace):
    from pyqemb.training.trainer import StopRequest

    class Stopped(StopRequest):
        def __init__(self):
            self.name, self._before = "SIGINT", {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyqemb.training.trainer.StopRequest", Stopped)
        with pytest.raises(Interrupted, match="stopped by SIGINT before the first step; nothing is lost") as caught:
            pyqemb.train(config(workplace))
    assert caught.value.exit_code == 75
    assert pyqemb.train(config(workplace), resume="auto").steps == 12


RUN = """
import sys, time, torch, pyqemb
torch.set_num_threads(1)
from pyqemb.cli import main
sys.exit(main(["train", sys.argv[1], "--resume", "auto"]))
"""


def start(path, **options):
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options
    )


def wait_for(path, process, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, process.stderr.read()
        time.sleep(0.01)


@pytest.mark.promise("R1", "SIGKILL and SIGTERM in one run of 60 steps")
def test_killed_and_terminated_processes_continue_bit_by_bit(workplace):
    path = workplace / "run.json"
    settings = config(workplace, "killed", steps=60)
    path.write_text(settings.model_dump_json())
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pyqemb.train(config(workplace, "straight", steps=60))
    finally:
        torch.set_num_threads(torch_threads)
    for number, name in ((signal.SIGKILL, "step_00000006"), (signal.SIGTERM, "step_00000015")):
        process = start(path)
        wait_for(workplace / "killed" / "checkpoints" / name, process)
        process.send_signal(number)
        process.wait(60)
        assert process.returncode == (75 if number == signal.SIGTERM else -number)
    process = start(path)
    assert process.wait(120) == 0, process.stderr.read()
    assert same(weights(workplace / "straight"), weights(workplace / "killed"))
    assert not list((workplace / "killed" / "checkpoints").glob(".*"))


@pytest.mark.promise("R9", "two training runs in one folder")
def test_a_second_run_in_the_folder_is_refused(workplace):
    path = workplace / "run.json"
    path.write_text(config(workplace, "shared", steps=5000).model_dump_json())
    process = start(path)
    try:
        wait_for(workplace / "shared" / "metrics.jsonl", process)
        with pytest.raises(ConfigError, match=f"another training run is running here: pid {process.pid}"):
            pyqemb.train(config(workplace, "shared", steps=5000), resume="auto")
    finally:
        process.kill()
        process.wait()


@pytest.mark.promise("R4", "a file of half the size")
def test_full_disk_leaves_the_previous_checkpoint(workplace):
    import resource

    pyqemb.train(config(workplace, steps=3))
    (before,) = checkpoints(workplace / "run" / "checkpoints")
    path = workplace / "run.json"
    path.write_text(config(workplace, steps=9).model_dump_json())
    size = (before / "model.safetensors").stat().st_size // 2

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    process = start(path, preexec_fn=limit)
    _, error = process.communicate(timeout=120)
    assert process.returncode not in (0, -signal.SIGXFSZ)
    assert "could not be written" in error
    assert verify(before) == 3
    assert not list(before.parent.glob(".*"))
    assert pyqemb.train(config(workplace, steps=9), resume="auto").steps == 9


def test_environment_has_no_hidden_settings(workplace):
    assert not [name for name in os.environ if name.startswith("PYQEMB_")]


def test_planned_memory_is_logged(workplace):
    rows = pyqemb.train(config(workplace, memory="1GB", steps=3)).metrics
    truth = pyqemb.train(config(workplace, "plain", steps=3, memory="none")).metrics
    for row, plain in zip(rows, truth, strict=True):
        assert row["predicted_bytes"] > 0
        assert row["measured_bytes"] >= 0
        assert row["replans"] == 0
        assert row["kept"] >= 1
        assert row["loss"] == pytest.approx(plain["loss"], rel=1e-3)
        assert "kept" not in plain


def test_skipping_is_logged(workplace):
    rows = pyqemb.train(config(workplace, skip_gradients=0.05, tokens_per_chunk=60, steps=6)).metrics
    assert all(0 <= row["skipped_norm"] <= 0.05 and 0 <= row["skipped_tokens"] < 1 for row in rows)
    assert any(row["skipped_texts"] > 0 for row in rows)


def test_adapters_continue_on_the_same_base_model_only(workplace):
    """Their checkpoints do not hold it. A file that is added to its folder does not matter."""
    config_of = {**config(workplace, steps=6).model_dump(), "lora": {"rank": 2}}
    pyqemb.train(stage2(**config_of))
    longer = stage2(**{**config_of, "train": {**config_of["train"], "steps": 8}})
    (workplace / "base" / "more.json").write_text("{}")
    assert pyqemb.train(longer, resume="auto").steps == 8
    path = workplace / "base" / "model.safetensors"
    save_file({name: 2 * weight for name, weight in load_file(path).items()}, path, metadata={"format": "pt"})
    size = path.stat().st_size
    was_and_now = rf"model\.safetensors was {size} bytes, \w{{16}}, now {size} bytes, \w{{16}}$"
    with pytest.raises(ConfigError, match=r"cannot resume: the base model \S*base has changed: " + was_and_now):
        pyqemb.train(longer, resume="auto")
    with pytest.raises(CheckpointError, match=r"base: the base model has changed: " + was_and_now):
        pyqemb.consolidate(workplace / "run", out=workplace / "out")


def test_adapters_of_an_earlier_version_continue(workplace):
    """Its checkpoints do not list the files of the base model."""
    config_of = stage2(**{**config(workplace, steps=6).model_dump(), "lora": {"rank": 2}})
    pyqemb.train(config_of)
    for folder in checkpoints(workplace / "run" / "checkpoints"):
        state = json.loads((folder / "state.json").read_text())
        assert state.pop("base").keys() == {"config.json", "model.safetensors", "tokenizer.json"}
        (folder / "state.json").write_text(json.dumps(state))
        manifest = unseal((folder / "manifest.json").read_bytes(), "manifest")
        (folder / "manifest.json").unlink()
        shards = {name: entry for name, entry in manifest["files"].items() if name.endswith(".safetensors")}
        write_manifest(folder, manifest["step"], 1, shards)
    assert pyqemb.train(config_of, resume="auto").steps == 6
    pyqemb.train(config(workplace, "all", steps=3))
    (folder,) = checkpoints(workplace / "all" / "checkpoints")
    assert "base" not in json.loads((folder / "state.json").read_text())


def test_adapters_are_trained_written_and_resumed(workplace):
    """Only they change; the model that comes out holds them; a run that was stopped goes on bit by bit."""

    def lora(run, **train):
        settings = config(workplace, run, **train).model_dump()
        return stage2(**{**settings, "lora": {"rank": 2, "alpha": 8.0}})

    result = pyqemb.train(lora("whole"))
    assert result.metrics[-1]["loss"] < result.metrics[0]["loss"]
    base = load_file(workplace / "base" / "model.safetensors")
    final, adapter = (
        weights(workplace / "whole"),
        load_file(workplace / "whole" / "adapter" / "adapter_model.safetensors"),
    )
    assert set(final) == set(base)
    changed = {name for name in base if not torch.equal(base[name], final[name])}
    assert changed == {name for name in base if "_proj" in name}
    name = "layers.0.self_attn.q_proj"
    delta = 4.0 * adapter[f"base_model.model.{name}.lora_B.weight"] @ adapter[f"base_model.model.{name}.lora_A.weight"]
    assert (base[f"{name}.weight"] + delta - final[f"{name}.weight"]).abs().max() < 1e-6
    pyqemb.train(lora("parts", steps=6), on_step=None)
    with pytest.raises(ConfigError, match=r"cannot resume with another configuration: lora\.rank was 2, now 4"):
        pyqemb.train(stage2(**{**lora("parts").model_dump(), "lora": {"rank": 4, "alpha": 8.0}}), resume="auto")
    stopped = workplace / "whole" / "checkpoints"
    assert all(".lora." in name for name in load_file(checkpoints(stopped)[-1] / "model.safetensors"))
    pyqemb.train(lora("again", steps=12))
    assert same(weights(workplace / "again"), final)


@pytest.mark.parametrize(
    "train", [{"precision": "bfloat16"}, {"memory": "auto"}, {"activation_checkpointing": True}], ids=str
)
def test_adapters_with(workplace, train):
    settings = config(workplace, "with", **train).model_dump()
    settings["lora"] = {"rank": 2, "alpha": 8.0, "dropout": 0.0}
    result = pyqemb.train(stage2(**settings))
    assert result.metrics[-1]["loss"] < result.metrics[0]["loss"]
    adapter = load_file(workplace / "with" / "adapter" / "adapter_model.safetensors")
    assert all(float(tensor.float().abs().max()) > 0 for name, tensor in adapter.items() if "lora_B" in name)


def test_dropout_in_adapters_repeats_itself(workplace):
    runs = {}
    for name in ("one", "again"):
        settings = config(workplace, name, steps=3).model_dump()
        settings["lora"] = {"rank": 2, "alpha": 8.0, "dropout": 0.3}
        runs[name] = [row["loss"] for row in pyqemb.train(stage2(**settings)).metrics]
    assert runs["one"] == runs["again"]
