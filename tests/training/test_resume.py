"""Which configurations, data and weights a checkpoint may be continued with."""

import copy

import pytest
import torch

from pyqemb.errors import CheckpointError, ConfigError
from pyqemb.training import resume, stage2
from pyqemb.training.resume import changed_files, check_continues, differences, flat
from pyqemb.training.state import Checkpoint

WEIGHTS = {"a": torch.ones(2, 3), "b": torch.tensor(1.0)}


def config(data=None, **train):
    return stage2(model={"base": "base"}, data=data or [{"path": "pairs.jsonl"}], train={"steps": 9, **train})


def checkpoint(tmp_path, of=None, **state):
    stored = {"config": (of or config()).model_dump(mode="json"), "data": "digest", **state}
    return Checkpoint(tmp_path, 4, WEIGHTS, {}, stored)


def message(error, *args):
    with pytest.raises(error) as caught:
        check_continues(*args)
    return str(caught.value)


def test_the_same_run_continues(tmp_path):
    check_continues(checkpoint(tmp_path), config(), "digest", WEIGHTS)
    check_continues(checkpoint(tmp_path, base={"x": "1"}), config(), "digest", WEIGHTS, {"x": "1", "y": "2"})
    check_continues(checkpoint(tmp_path, base={"x": "1"}), config(), "digest", WEIGHTS)  # not asked
    check_continues(checkpoint(tmp_path), config(), "digest", WEIGHTS, {"x": "1"})  # of an earlier version


def test_the_teacher_is_the_same(tmp_path):
    def with_teacher(name):
        return stage2(model={"base": "base"}, data=[{"path": "pairs.jsonl"}], teacher={"model": name})

    now = with_teacher("large")
    stored = checkpoint(tmp_path, of=now, teacher={"x": "1"})
    check_continues(stored, now, "digest", WEIGHTS, None, {"teacher": {"x": "1"}})
    check_continues(checkpoint(tmp_path, of=now), now, "digest", WEIGHTS, None, {"teacher": {"x": "1"}})  # earlier
    found = message(ConfigError, stored, now, "digest", WEIGHTS, None, {"teacher": {"x": "2"}})
    assert found.startswith("cannot resume: teacher.model large has changed: x ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 10), ("epochs", 3), ("log_every", 7), ("max_bad_steps", 3), ("token_cache", "x"),
        ("rank_timeout", 99.0), ("tensorboard", True),
    ],
)  # fmt: skip
def test_settings_that_may_change(tmp_path, name, value):
    now = config()
    stored = checkpoint(tmp_path)
    before = copy.deepcopy(stored.state["config"])
    stored.state["config"]["train"][name] = value
    assert before != stored.state["config"]
    check_continues(stored, now, "digest", WEIGHTS)


@pytest.mark.parametrize("section", ["parallel", "eval", "save", "log"])
def test_sections_that_may_change(tmp_path, section):
    stored = checkpoint(tmp_path)
    stored.state["config"][section] = {"x": 1}
    check_continues(stored, config(), "digest", WEIGHTS)


def test_another_configuration_is_refused_with_its_differences(tmp_path):
    now = config(learning_rate=1e-3, seed=2)
    assert message(ConfigError, checkpoint(tmp_path, config(learning_rate=2e-3, seed=1)), now, "digest", WEIGHTS) == (
        "cannot resume with another configuration: train.learning_rate was 0.002, now 0.001; train.seed was 1, now 2"
    )


def test_the_length_is_fixed_if_the_sampling_depends_on_it(tmp_path):
    data = [{"path": "a.jsonl", "max_epochs": 2}, {"path": "b.jsonl"}]
    before, now = config(data, steps=9), config(data, steps=10)
    assert message(ConfigError, checkpoint(tmp_path, before), now, "digest", WEIGHTS) == (
        "cannot resume with another configuration: train.steps was 9, now 10"
    )
    check_continues(checkpoint(tmp_path, before), before, "digest", WEIGHTS)


def test_another_base_model_is_refused(tmp_path):
    stored = checkpoint(tmp_path, base={"a": "1", "b": "2", "c": "3"})
    assert message(ConfigError, stored, config(), "digest", WEIGHTS, {"a": "1", "b": "9", "d": "4"}) == (
        "cannot resume: the base model base has changed: b was 2, now 9; c was 3, now missing"
    )
    assert changed_files(stored, {"a": "1", "b": "2", "c": "3", "d": "4"}) == []


def test_keys_that_are_newer_than_the_checkpoint_have_their_defaults(tmp_path):
    stored = checkpoint(tmp_path)
    default = stored.state["config"]["train"].pop("ema_decay")
    check_continues(stored, config(), "digest", WEIGHTS)
    assert message(ConfigError, stored, config(ema_decay=0.5), "digest", WEIGHTS) == (
        f"cannot resume with another configuration: train.ema_decay was {default!r}, now 0.5"
    )
    assert "ema_decay" not in stored.state["config"]["train"]
    del stored.state["config"]["train"]
    assert "train.learning_rate was " in message(ConfigError, stored, config(learning_rate=0.5), "digest", WEIGHTS)
    assert resume._with_new_keys({"a": 1, "train": {"steps": 3}})["a"] == 1
    assert resume._with_new_keys({"train": {"steps": 3}})["train"]["steps"] == 3


def test_other_data_are_refused(tmp_path):
    assert message(ConfigError, checkpoint(tmp_path), config(), "other", WEIGHTS) == (
        "cannot resume: the training data are not those of the checkpoint"
    )


@pytest.mark.parametrize(
    "weights", [{"a": torch.ones(3, 2), "b": WEIGHTS["b"]}, {"a": WEIGHTS["a"]}, {**WEIGHTS, "c": WEIGHTS["a"]}, {}]
)
def test_other_tensors_are_refused(tmp_path, weights):
    assert message(CheckpointError, checkpoint(tmp_path), config(), "digest", weights) == (
        "step 4: its tensors do not match those of base"
    )


def test_differences():
    before = {"a": 1, "b": {"c": [1, {"d": 2}], "e": 3}, "f": [1, 2], "gone": None, "same": "x"}
    now = {"a": 1.5, "b": {"c": [1, {"d": 4}], "e": 5}, "f": [1], "new": 7, "same": "x"}
    found = [
        "a was 1, now 1.5", "b.c.1.d was 2, now 4", "b.e was 3, now 5", "f was [1, 2], now [1]",
        "new was None, now 7",
    ]  # fmt: skip
    assert differences(before, now, set()) == found
    assert differences(before, now, {"a", "b.c", "f"}) == [found[2], found[4]]
    assert differences(before, now, {"b"}) == [found[0], found[3], found[4]]
    assert differences(before, before, set()) == []
    assert differences({"Xa": 1}, {"Xa": 2}, set()) == ["Xa was 1, now 2"]
    assert differences([1], {"0": 1}, set()) == [" was [1], now {'0': 1}"]
    assert differences({"a": {}}, {"a": [1]}, set()) == ["a was {}, now [1]"]
    assert differences({"a": [1, 2]}, {"a": "xy"}, set()) == ["a was [1, 2], now 'xy'"]


def test_flat():
    assert flat({"a": 1, "b": {"c": 2, "d": {"e": [3]}, "f": {}}}) == {"a": 1, "b.c": 2, "b.d.e": [3]}
    assert resume.flat({}) == {}
