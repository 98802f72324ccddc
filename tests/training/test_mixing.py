"""Runs over several sets: shards or lines, caps, negatives by set, tokens kept; the same batches, resumed exactly."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

import pyqemb
from pyqemb.data.example import Example, read_examples, write_examples
from pyqemb.data.shards import write_shards
from pyqemb.data.tokenizer import Tokenizer
from pyqemb.errors import ConfigError, DataError
from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import stage2
from pyqemb.training.datasets import make_loader, mixture, num_steps, read_datasets


@pytest.fixture
def workplace(tmp_path):
    write_tiny_folder(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)

    def some(count, task=None):
        for _ in range(count):
            words = [str(n) for n in torch.randint(0, 99, (6,), generator=generator).tolist()]
            yield Example(" ".join(words), " ".join(words[::-1]), (" ".join(sorted(words)), "7 7"), task=task)

    write_examples(tmp_path / "large.jsonl", some(96))
    write_examples(tmp_path / "small.jsonl", [*some(12, "one"), *some(20, "two")])
    for name in ("large", "small"):
        write_shards(tmp_path / name, read_examples(tmp_path / f"{name}.jsonl"), rows_per_file=10)
    return tmp_path


def config(folder, *data, run="run", **train):
    defaults = {"steps": 12, "global_batch_size": 8, "learning_rate": 3e-3, "num_negatives": 1, "tokens_per_chunk": 200}
    return stage2(
        model={"base": str(folder / "base")}, data=data, train={**defaults, **train},
        save={"dir": str(folder / run), "every": 5, "keep": 3},
    )  # fmt: skip


def both(folder, suffix, **more):
    return [{"path": str(folder / f"{name}{suffix}"), "instruction": "Find", **more} for name in ("large", "small")]


def test_shards_train_what_lines_train_and_go_on_exactly(workplace, caplog):
    caplog.set_level(logging.INFO, "pyqemb")
    lines = pyqemb.train(config(workplace, *both(workplace, ".jsonl"), run="lines", mixing_alpha=0.5))
    shards = pyqemb.train(config(workplace, *both(workplace, ""), run="shards", mixing_alpha=0.5))
    assert [row["loss"] for row in lines.metrics] == [row["loss"] for row in shards.metrics]
    assert {row["dataset"] for row in shards.metrics} == {"large", "small/one", "small/two"}
    table = caplog.text
    assert "small/two" in table
    assert "epochs" in table

    class StopTrainingError(Exception):
        pass

    def stop(row):
        if row["step"] == 7:
            raise StopTrainingError

    again = config(workplace, *both(workplace, ""), run="again", mixing_alpha=0.5)
    with pytest.raises(StopTrainingError):
        pyqemb.train(again, on_step=stop)
    resumed = pyqemb.train(again, resume="auto")
    a, b = (load_file(result.folder / "model.safetensors") for result in (shards, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    changed = both(workplace, "")
    changed[1]["instruction"] = "Search"
    with pytest.raises(ConfigError, match=r"data\.1\.instruction was 'Find', now 'Search'"):
        pyqemb.train(config(workplace, *changed, run="again", mixing_alpha=0.5), resume="auto")


def test_no_text_is_tokenised_twice(workplace, monkeypatch):
    asked = []
    encode = Tokenizer.encode_documents
    monkeypatch.setattr(
        Tokenizer, "encode_documents", lambda self, texts: asked.append(list(texts)) or encode(self, texts)
    )
    plain = pyqemb.train(config(workplace, *both(workplace, ".jsonl"), run="a", steps=40))
    asked.clear()
    kept = pyqemb.train(
        config(workplace, *both(workplace, ".jsonl"), run="b", steps=40, token_cache=str(workplace / "tokens"))
    )
    texts = [text for batch in asked for text in batch]
    assert len(texts) == len(set(texts)) > 200
    assert [row["loss"] for row in plain.metrics] == [row["loss"] for row in kept.metrics]
    asked.clear()
    pyqemb.train(
        config(workplace, *both(workplace, ".jsonl"), run="c", steps=40, token_cache=str(workplace / "tokens"))
    )
    assert not [text for batch in asked for text in batch if text in set(texts)]


def test_caps(workplace):
    large, small = ({"path": str(workplace / f"{name}.jsonl")} for name in ("large", "small"))

    def found(*data, **train):
        settings = config(workplace, *data, **train)
        sets = read_datasets(settings)
        loader = make_loader(sets, settings)
        return {row.name: row for row in mixture(loader, num_steps(settings, loader))}

    free = found(large, small, steps=160)
    assert free["large"].share == pytest.approx(0.7, abs=0.06)
    capped = found({**large, "max_share": 0.25}, small, steps=160)
    assert capped["large"].share == pytest.approx(0.25, abs=0.04)
    few = found(large, {**small, "max_epochs": 2.0}, steps=160)
    assert few["small/one"].epochs == few["small/two"].epochs == 2.0
    with pytest.raises(ConfigError, match=r"leave .* of the steps to no dataset"):
        found({**large, "max_epochs": 1.0}, {**small, "max_epochs": 1.0}, steps=1000)


def test_steps_are_not_free_where_shares_depend_on_them(workplace):
    large, small = ({"path": str(workplace / f"{name}.jsonl")} for name in ("large", "small"))
    pyqemb.train(config(workplace, large, small, run="free"))
    assert pyqemb.train(config(workplace, large, small, run="free", steps=14), resume="auto").steps == 14
    pyqemb.train(config(workplace, large, {**small, "max_epochs": 2.0}, run="bound"))
    with pytest.raises(ConfigError, match=r"train\.steps was 12, now 14"):
        pyqemb.train(config(workplace, large, {**small, "max_epochs": 2.0}, run="bound", steps=14), resume="auto")


def test_in_batch_negatives_by_set(workplace):
    large, small = ({"path": str(workplace / f"{name}.jsonl")} for name in ("large", "small"))

    def objectives(*data):
        return {name: each.name for name, each in read_datasets(config(workplace, *data)).objectives.items()}

    assert objectives(large, {**small, "in_batch_negatives": False}) == {
        "large": "info_nce",
        "small/one": "classification",
        "small/two": "classification",
    }
    write_examples(workplace / "labels.jsonl", [Example("t", "good", ("bad",), task="classification")])
    labels = {"path": str(workplace / "labels.jsonl")}
    assert objectives(labels) == {"labels": "classification"}
    assert objectives({**labels, "in_batch_negatives": True}) == {"labels": "info_nce"}
    write_examples(workplace / "sts.jsonl", [Example("a", "b", task="sts", score=1.0)])
    with pytest.raises(ConfigError, match="set 'sts' is trained by cosent, which uses no negatives"):
        read_datasets(config(workplace, {"path": str(workplace / "sts.jsonl"), "in_batch_negatives": False}))
    rows = pyqemb.train(config(workplace, large, {**small, "in_batch_negatives": False}, run="x")).metrics
    assert {row["dataset"] for row in rows} == {"large", "small/one", "small/two"}


def test_what_shards_lack_is_named(workplace):
    write_shards(workplace / "sts", [Example("a", "b", task="sts", score=1.0), Example("c", "d", task="sts")])
    with pytest.raises(DataError, match="set 'sts': example 2 has no score"):
        read_datasets(config(workplace, {"path": str(workplace / "sts")}))


def test_an_older_checkpoint_goes_on(workplace):
    """Keys that a configuration did not know then are what they were by default."""
    settings = config(workplace, {"path": str(workplace / "large.jsonl")}, steps=5)
    pyqemb.train(settings)
    for path in (workplace / "run" / "checkpoints").glob("*/state.json"):
        state = json.loads(path.read_text())
        for key in ("max_share", "max_epochs", "in_batch_negatives"):
            del state["config"]["data"][0][key]
        del state["config"]["train"]["token_cache"]
        before = json.dumps(settings.model_dump(mode="json"))
        assert before != json.dumps(state["config"])
        from pyqemb.training.resume import differences

        assert differences(state["config"], settings.model_dump(mode="json"), set()) == []
