"""Damaged checkpoints: each flipped bit and cut is found, its file is named, and the checkpoint before is used."""

import json
import random
import shutil

import pytest

import pyqemb
from pyqemb.errors import CheckpointError, MachineError
from pyqemb.model import checkpoint
from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import stage2
from pyqemb.training.state import checkpoints, newest_sound, verify


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    write_tiny_folder(folder / "base")
    rows = [{"query": f"q {i}", "positive": f"d {i}"} for i in range(8)]
    config = stage2(
        model={"base": str(folder / "base")}, train={"steps": 2, "global_batch_size": 4, "device": "cpu"},
        save={"dir": str(folder / "run"), "every": 1, "keep": 2}, lora={"rank": 1},
    )  # fmt: skip
    pyqemb.train(config, data=rows)
    return checkpoints(folder / "run" / "checkpoints")


@pytest.mark.parametrize(
    ("bits", "cuts"), [(100, 20), pytest.param(1000, 200, marks=pytest.mark.deep, id="all")]
)  # fmt: skip
def test_every_damage_is_found_and_named(saved, tmp_path, record_property, bits, cuts):
    before, newest = saved
    copy = tmp_path / newest.name
    shutil.copytree(newest, copy)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    assert len(files) > 8
    dice = random.Random(0)
    for number in range(bits + cuts):
        path = files[number % len(files)]
        whole = path.read_bytes()
        place = dice.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << dice.randrange(8)
        path.write_bytes(flipped if number < bits else whole[:place])
        said = []
        found = newest_sound([copy, before], said.append)
        assert found is not None
        assert found.folder == before, f"byte {place} of {path}"
        assert len(said) == 1
        assert path.name in said[0]
        with pytest.raises(CheckpointError, match=path.name):
            verify(copy)
        path.write_bytes(whole)
    assert newest_sound([copy, before], print).folder == copy
    record_property("R5", f"{bits} flipped bits and {cuts} cuts in {len(files)} files")
    assert json.loads((copy / "state.json").read_text())["steps"] == 2


def test_a_file_that_cannot_be_opened_is_not_damaged(saved, tmp_path, monkeypatch):
    """safetensors says of each that it does not exist."""

    def safe_open(path, **options):
        raise FileNotFoundError(f"No such file or directory: {path}")

    monkeypatch.setattr(checkpoint, "safe_open", safe_open)
    with pytest.raises(MachineError, match=r"model\.safetensors: cannot be read: Input/output error"):
        newest_sound(saved[::-1], print)
    with pytest.raises(CheckpointError, match=r"none\.safetensors: damaged, cut short"):
        checkpoint.open_safetensors(tmp_path / "none.safetensors")
