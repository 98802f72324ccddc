"""The parts of a run, each built by a function of its own."""

import json

import pytest
import torch

from pyqemb.errors import CheckpointError, ConfigError, MachineError
from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import setup, stage2
from pyqemb.training.datasets import read_datasets
from pyqemb.training.objectives import LossParameters
from pyqemb.training.parallel.together import together
from pyqemb.training.parallel.world import World
from pyqemb.training.setup import build_cache, build_optimizer, find_checkpoint, load_model
from pyqemb.training.steps import StepLoader, StepStats


@pytest.fixture
def config(tmp_path):
    write_tiny_folder(tmp_path / "base")
    rows = [{"query": f"q {i}", "positive": f"d {i}", "negatives": [f"n {i}"]} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return stage2(
        model={"base": str(tmp_path / "base")}, data=[{"path": str(tmp_path / "pairs.jsonl")}],
        loss={"learn_temperature": True},
        train={"steps": 5, "global_batch_size": 8, "precision": "bfloat16", "device": "cpu"},
        save={"dir": str(tmp_path / "run")},
    )  # fmt: skip


def test_the_optimizer_holds_float32_weights_and_the_parameters_of_the_loss(config):
    model, parameters = load_model(config), LossParameters(config.loss)
    optimizer = build_optimizer(config, model, parameters)
    assert model.dtype == torch.bfloat16
    assert {weight.dtype for weight in optimizer.weights.values()} == {torch.float32}
    assert optimizer.extra_parameters == {"loss.log_temperature": parameters.log_temperature}
    assert len(optimizer.grad_tensors) == len(optimizer.weights) + 1


def test_one_step_of_the_parts(config):
    """As Run.train_step puts them together."""
    model, parameters, world = load_model(config), LossParameters(config.loss), World()
    optimizer = build_optimizer(config, model, parameters)
    cache = build_cache(config, model, optimizer)
    batches = StepLoader(config, read_datasets(config), model, parameters, world)
    batch = batches.load(0)
    assert batches.steps == 5
    assert batch.dataset == "pairs"
    assert batch.num_queries == 8
    assert batch.stream.num_sequences == len(batch.texts.texts) == len(batch.partition[0])
    forward = cache.forward(batch.stream)
    embeddings = forward.embeddings.requires_grad_()
    part = batch.loss(embeddings, world, ring=False)
    stats = StepStats.reduce(part, True, 7, world)
    assert stats.is_finite
    assert stats.stop
    assert stats.tokens == 7
    assert stats.loss == pytest.approx(float(part.loss), rel=1e-6)
    cache.backward(forward, torch.autograd.grad(part.loss, embeddings)[0])
    assert all(weight.grad is not None for weight in optimizer.weights.values())


def test_a_part_that_is_not_finite_makes_the_step_not_finite(config):
    model, parameters = load_model(config), LossParameters(config.loss)
    batch = StepLoader(config, read_datasets(config), model, parameters, World()).load(0)
    part = batch.loss(model(batch.stream) * torch.nan, World(), ring=False)
    assert not StepStats.reduce(part, False, 1, World()).is_finite


def test_no_checkpoint_where_there_was_no_run(config, tmp_path):
    assert find_checkpoint(tmp_path / "run", "auto", World()) is None
    with pytest.raises(CheckpointError, match="holds no intact checkpoint"):
        find_checkpoint(tmp_path / "run", tmp_path / "base", World())


def test_ranks_that_share_the_weights_share_the_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "blind_ranks", lambda world, folder: [3])
    with pytest.raises(ConfigError, match=r"save\.dir: rank 3 does not see the folder of rank 0, .*into one folder"):
        find_checkpoint(tmp_path, None, World(), shards=2)
    assert find_checkpoint(tmp_path, None, World()) is None


def test_a_check_that_fails_raises_its_error():
    def fail():
        raise MachineError("no room")

    with together(World()):
        pass
    with pytest.raises(MachineError, match="no room"), together(World()):
        fail()


def test_a_reranker_has_no_settings_of_embedders(config):
    values = config.model_dump(exclude={"loss"}) | {"task": "rerank"}
    stage2(**values)
    for section, key, value in (
        ("loss", "objective", "cosent"),
        ("loss", "matryoshka", [8]),
        ("loss", "focal", 0.5),
        ("loss", "tau_plus", 0.1),
        ("loss", "margin", None),
        ("loss", "groups", {"query_query": False}),
        ("loss", "temperature", 0.5),
        ("train", "documents", "ring"),
    ):
        with pytest.raises(ConfigError, match=f"task 'rerank' has no {section}.{key}"):
            stage2(**{**values, section: {**values.get(section, {}), key: value}})
