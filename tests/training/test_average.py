"""The exponential moving average of the weights: against float64, in whole runs, in checkpoints and folders."""

import pytest
import torch
from safetensors.torch import load_file

import pyqemb
from pyqemb.errors import ConfigError
from pyqemb.merging.run import _Unrounded
from pyqemb.model.families import FAMILIES
from pyqemb.testing.tiny import tiny_embedder
from pyqemb.training import stage2
from pyqemb.training.config import TrainSection
from pyqemb.training.dry_run import plan
from pyqemb.training.groups import checkpoint_bytes
from pyqemb.training.optim import Optimizer, average_decay
from pyqemb.training.setup import load_model
from pyqemb.training.state import Checkpoint, checkpoints

DTYPES = [torch.float32, torch.bfloat16]
PRECISIONS = ["float32", "bfloat16"]


def config(run="run", lora=None, evaluation=None, save=None, **train):
    defaults = {
        "steps": 6, "global_batch_size": 8, "learning_rate": 3e-3, "device": "cpu", "memory": None, "ema_decay": 0.6,
    }  # fmt: skip
    return stage2(
        model={"base": "base"}, data=[{"path": "pairs.jsonl"}], train={**defaults, **train}, lora=lora,
        eval=evaluation or {}, save={"dir": run, "every": 2, **(save or {})},
    )  # fmt: skip


def moved(optimizer, steps, generator, seen=None):
    """Steps with random gradients; `seen` gets the weights after each."""
    for step in range(steps):
        for weight in optimizer.weights.values():
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step(1e-2)
        optimizer.update_average(step + 1)
        if seen is not None:
            seen.append({name: weight.detach().double() for name, weight in optimizer.weights.items()})


def last(run):
    return Checkpoint.load(checkpoints(run / "checkpoints")[-1])


def averages(checkpoint):
    return {name.removesuffix("/ema"): checkpoint.optimizer[name] for name in checkpoint.optimizer if "/ema" in name}


def test_the_decay_warms_up():
    assert [average_decay(step, 0.9) for step in (1, 2, 80, 81, 1000)] == [2 / 11, 3 / 12, 0.9, 0.9, 0.9]
    assert average_decay(1, 0.1) == 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [0.3, 0.99])
def test_the_average_is_that_of_float64(dtype, decay):
    model = tiny_embedder()
    truth = {name: p.detach().double() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, TrainSection(ema_decay=decay), dtype)
    seen = []
    moved(optimizer, 30, torch.Generator().manual_seed(0), seen)
    for step, weights in enumerate(seen, start=1):
        kept = min(decay, (1 + step) / (10 + step))
        truth = {name: kept * average + (1 - kept) * weights[name] for name, average in truth.items()}
    for name, average in optimizer.average.items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), truth[name], rtol=2e-6, atol=2e-7)
        assert not torch.allclose(average, optimizer.weights[name], rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_model_has_the_average_in_the_context_and_its_weights_after_it(dtype):
    model = tiny_embedder()
    optimizer = Optimizer(model, TrainSection(ema_decay=0.5), dtype)
    moved(optimizer, 3, torch.Generator().manual_seed(1))
    weights, average, computed = (
        {name: value.detach().clone() for name, value in values.items()}
        for values in (optimizer.weights, optimizer.average, dict(model.named_parameters()))
    )

    def fail():
        with optimizer.averaged():
            assert all(torch.equal(p, average[name].to(dtype)) for name, p in model.named_parameters())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    for now, before in (
        (optimizer.weights, weights), (optimizer.average, average), (dict(model.named_parameters()), computed)
    ):  # fmt: skip
        assert all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("lora", "optimizer"), [(None, "adamw"), ({"rank": 4}, "muon")])
def test_a_run_saves_evaluates_and_resumes_the_average(workplace, precision, lora, optimizer):
    class StopError(Exception):
        pass

    def stop(row):
        if row["step"] == 3:
            raise StopError

    measured = {}

    def evaluate(model):
        weights = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        measured[len(measured)] = weights
        return {"score": -float(len(measured))}  # the first is the best

    settings = {"lora": lora, "precision": precision, "evaluation": {"every": 2}, "optimizer": optimizer}
    result = pyqemb.train(config("straight", **settings), evaluate=evaluate)
    rounded = getattr(torch, precision)
    checkpoint = last(workplace / "straight")
    found = averages(checkpoint)
    assert found.keys() == checkpoint.weights.keys()
    assert all(not torch.equal(found[name], checkpoint.weights[name]) for name in found if "embed" not in name)
    assert len(measured) == 3
    assert all(torch.equal(measured[2][name], found[name].to(rounded).float()) for name in found)
    final = (result.folder / "model.safetensors").read_bytes()
    if lora is None:
        saved = load_file(result.folder / "model.safetensors")
        assert all(torch.equal(saved[name.removeprefix("model.")], found[name].to(rounded)) for name in found)
        best = load_file(result.best / "model.safetensors")
        assert all(torch.equal(best[name.removeprefix("model.")].float(), measured[0][name]) for name in found)
        exact = _Unrounded(result.folder, (), FAMILIES["qwen3"])
        assert all(torch.equal(exact[name.removeprefix("model.")], found[name]) for name in found)
    else:
        adapter = load_file(workplace / "straight" / "adapter" / "adapter_model.safetensors")
        key = "layers.0.self_attn.q_proj"
        wanted = found[f"model.{key}.lora.A"].to(rounded)
        assert torch.equal(adapter[f"base_model.model.{key}.lora_A.weight"], wanted)
    assert (pyqemb.consolidate("straight", out="whole") / "model.safetensors").read_bytes() == final

    with pytest.raises(StopError):
        pyqemb.train(config("stopped", **settings), evaluate=evaluate, on_step=stop)
    pyqemb.train(config("stopped", **settings), evaluate=evaluate, resume="auto")
    assert (workplace / "stopped" / "final" / "model.safetensors").read_bytes() == final
    again = last(workplace / "stopped")
    assert all(torch.equal(again.optimizer[name], checkpoint.optimizer[name]) for name in checkpoint.optimizer)
    with pytest.raises(ConfigError, match=r"train\.ema_decay was 0\.6, now 0\.5"):
        pyqemb.train(config("stopped", **settings, ema_decay=0.5), resume="auto")


def test_the_trained_weights_are_those_without_an_average(workplace):
    """The average changes nothing of the training, and `weights` selects what is saved and evaluated."""
    seen = []

    def evaluate(model):
        seen.append(model.model.norm.weight.detach().clone())
        return {"score": 1.0}

    plain = pyqemb.train(config("plain", ema_decay=None), evaluate=evaluate)
    trained = pyqemb.train(
        config("trained", evaluation={"weights": "trained"}, save={"weights": "trained"}), evaluate=evaluate
    )
    for folder in ("folder", "best"):
        one, other = (load_file(getattr(result, folder) / "model.safetensors") for result in (plain, trained))
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(*seen)
    consolidated = pyqemb.consolidate("trained", out="whole") / "model.safetensors"
    assert consolidated.read_bytes() == (trained.folder / "model.safetensors").read_bytes()


def test_a_failed_evaluation_leaves_the_weights_in_the_checkpoint(workplace):
    def fail(model):
        raise RuntimeError("no")

    straight = pyqemb.train(config("straight"), evaluate=lambda model: {"score": 1.0})
    with pytest.raises(RuntimeError, match="no"):
        pyqemb.train(config("failed", evaluation={"every": 3}), evaluate=fail)
    assert last(workplace / "failed").step == 3
    again = pyqemb.train(
        config("failed", evaluation={"every": 3}), evaluate=lambda model: {"score": 1.0}, resume="auto"
    )
    one, other = (load_file(result.folder / "model.safetensors") for result in (straight, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_skipped_step_does_not_move_the_average(workplace, monkeypatch):
    steps = []
    monkeypatch.setattr(Optimizer, "clip", lambda self: float("nan") if len(steps) == 1 else 1.0)
    monkeypatch.setattr(Optimizer, "update_average", lambda self, step: steps.append(step))
    with pytest.raises(pyqemb.errors.PyqembError, match="not finite"):
        pyqemb.train(config(max_bad_steps=2))
    assert steps == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"ema_decay": None, "evaluation": {"weights": "ema"}},
            r"^eval\.weights: the average of .*ema_decay, got 'ema'$",
        ),
        (
            {"ema_decay": None, "save": {"weights": "ema"}},
            r"^save\.weights: the average of .*ema_decay, got 'ema'$",
        ),
        ({"ema_decay": 1.0}, r"train\.ema_decay: .* got 1\.0"),
        ({"ema_decay": 0.999999}, r"train\.ema_decay: .* 0\.99999, got"),  # float32 would not add such small changes
        ({"ema_decay": 0.0}, r"train\.ema_decay: .* got 0\.0"),
    ],
)
def test_averages_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        config(**settings)


def test_the_plan_counts_the_average(workplace):
    trained = sum(p.numel() for p in tiny_embedder().parameters())
    assert checkpoint_bytes(load_model(config()), config().train) == 16 * trained
    assert checkpoint_bytes(load_model(config()), config(ema_decay=None).train) == 12 * trained
    memory = next(line for line in plan(config()) if line.startswith("memory"))
    assert f"{16 * trained / 1e3:.2f} kB of weights, moments and average;" in memory
