"""Checkpoints without a run: their files, every refusal with its words, which one is taken, and which are deleted."""

import hashlib
import json
import os
import random
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from pyqemb.data.sealed import seal, unseal
from pyqemb.errors import CheckpointError, ConfigError, DataError, MachineError, RankError
from pyqemb.model.shard_files import Slice
from pyqemb.training import state
from pyqemb.training.parallel.world import World
from pyqemb.training.state import Checkpoint, find, verify

STATE = {
    "config": {"a": 1}, "data": "digest", "random": [], "best": None, "bad_steps": 0, "evaluations_since_best": 2,
    "steps": 9,
}  # fmt: skip
BEST = {"metric": "ndcg", "value": 0.5, "step": 3}
WEIGHTS = {"w": torch.arange(6.0).view(3, 2), "n": torch.tensor(2.0)}
OPTIMIZER = {"w.m": torch.ones(3, 2), "w.v": torch.zeros(3, 2)}
_EXPECTED = "expected 'auto', the folder of a run with checkpoints, or one of its checkpoints (step_...)"


@pytest.fixture(autouse=True)
def nothing_verified(monkeypatch):
    monkeypatch.setattr(state, "_verified", set())


def slices(tensors, rows=None):
    if rows is None:
        return {name: Slice.of(x) for name, x in tensors.items()}
    return {
        name: Slice(x[rows].clone(), rows.start, tuple(x.shape)) if x.ndim else Slice.of(x)
        for name, x in tensors.items()
    }


def write(folder, step, content=STATE, shards=1):
    """A checkpoint `step_XXXXXXXX` in `folder`."""
    path = folder / f"step_{step:08}"
    (path / "portable").mkdir(parents=True)
    (path / "portable" / "config.json").write_text("{}")
    (path / "state.json").write_text(json.dumps(content))
    files = {}
    for number, rows in enumerate([None] if shards == 1 else [slice(0, 2), slice(2, 3)]):
        files |= state.write_shard(path, number, shards, slices(WEIGHTS, rows), slices(OPTIMIZER, rows))
    state.write_manifest(path, step, shards, files)
    return path


def forge(path, **changes):
    """A manifest with other facts and a right checksum."""
    manifest = unseal((path / "manifest.json").read_bytes(), "") | changes
    (path / "manifest.json").write_bytes(seal({k: v for k, v in manifest.items() if v is not ...}))


def message(error, call, *args, **options):
    with pytest.raises(error) as caught:
        call(*args, **options)
    assert type(caught.value) is error
    return str(caught.value)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# What is written


@pytest.mark.parametrize("shards", [1, 2])
def test_a_checkpoint_comes_back(tmp_path, shards):
    path = write(tmp_path, 7, {**STATE, "best": BEST, "base": {"config.json": "digest"}}, shards)
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        found = Checkpoint.load(path, rank, size)
        assert (found.folder, found.step) == (path, 7)
        for tensors, truth in ((found.weights, WEIGHTS), (found.optimizer, OPTIMIZER)):
            assert set(tensors) == set(truth)
            assert all(tensors[name].equal(truth[name]) for name in truth)
        assert found.state == {**STATE, "best": BEST, "base": {"config.json": "digest"}}
        assert found.digest == digest(path / "manifest.json")
    assert verify(path) == 7
    names = sorted(str(each.relative_to(path)) for each in path.rglob("*") if each.is_file())
    kinds = ["model.safetensors", "optimizer.safetensors"]
    if shards == 2:
        kinds = [f"{kind}-0000{n}-of-00002.safetensors" for kind in ("model", "optimizer") for n in (1, 2)]
    assert names == sorted(["manifest.json", "state.json", "portable/config.json", *kinds])


def test_the_format(tmp_path):
    """Checkpoints of earlier versions are read, or have another number."""
    path = write(tmp_path, 7)
    names = ["model.safetensors", "optimizer.safetensors", "portable/config.json", "state.json"]
    files = {name: {"size": (path / name).stat().st_size, "sha256": digest(path / name)} for name in names}
    manifest = {"format": 3, "step": 7, "shards": 1, "files": files}
    assert (path / "manifest.json").read_bytes() == seal(manifest)


def test_whole_tensors_are_in_the_first_shard_only(tmp_path):
    path = write(tmp_path, 1, shards=2)
    from safetensors import safe_open

    for number, names in ((1, ["n", "w"]), (2, ["w"])):
        with safe_open(path / f"model-0000{number}-of-00002.safetensors", framework="pt") as file:
            assert sorted(file.keys()) == names
            first = json.loads(file.metadata()["slices"])["w"]["first"]
            assert first == 2 * (number - 1)
    with safe_open(write(tmp_path, 2) / "model.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["n", "w"]


def test_a_shard_is_read_back(tmp_path, monkeypatch):
    """A disk that returns other bytes than were written is found at once."""
    monkeypatch.setattr(state, "sha256", lambda path: "other")
    with pytest.raises(MachineError) as caught:
        state.write_shard(tmp_path, 0, 1, slices(WEIGHTS), slices(OPTIMIZER))
    path = tmp_path / "model.safetensors"
    assert str(caught.value) == f"{path}: cannot be written: what was read back differs"
    assert (caught.value.errno, caught.value.filename) == (5, str(path))


# What is refused


def names_of(path):
    return sorted(str(each.relative_to(path)) for each in path.rglob("*") if each.is_file())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_damage_is_found_by_some_rank(tmp_path, size):
    path = write(tmp_path, 7, shards=2)
    for name in names_of(path):
        if name == "manifest.json":
            continue
        before = (path / name).read_bytes()
        (path / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        found = []
        for rank in range(size):
            try:
                Checkpoint.load(path, rank, size)
            except CheckpointError as error:
                found.append(str(error))
        assert f"{path / name}: damaged: its checksum is not the one in manifest.json" in found
        (path / name).write_bytes(before)
    for rank in range(size):
        Checkpoint.load(path, rank, size)


def test_every_rank_reads_a_part(tmp_path, monkeypatch):
    path, read = write(tmp_path, 7, shards=2), []
    real = state.sha256
    monkeypatch.setattr(state, "sha256", lambda file: (read.append(file.name), real(file))[1])
    parts = []
    for rank in range(3):
        read.clear()
        state._check_files(path, rank, 3)
        parts.append(list(read))
    assert [len(part) for part in parts] == [2, 2, 2]
    names = {each.name for each in path.rglob("*") if each.is_file()} - {"manifest.json"}
    assert {name for part in parts for name in part} == names
    read.clear()
    verify(path)
    assert set(read) == names


@pytest.mark.parametrize("call", [verify, Checkpoint.load])
def test_a_missing_or_short_file_is_named(tmp_path, call):
    path = write(tmp_path, 7)
    for name in names_of(path):
        file, before = path / name, (path / name).read_bytes()
        file.write_bytes(before[:-1])
        words = message(CheckpointError, call, path)
        if name != "manifest.json":
            assert words == f"{file}: damaged: expected {len(before)} bytes, found {len(before) - 1}"
        else:
            assert words == f"{file}: damaged: it does not match its own checksum"
        file.unlink()
        assert message(CheckpointError, call, path) == f"{file}: missing: the checkpoint is not complete"
        file.mkdir()
        words = message(CheckpointError, call, path)
        assert words.startswith(f"{file}: ")
        file.rmdir()
        file.write_bytes(before)
    assert message(CheckpointError, call, path / "state.json") == (
        f"{path / 'state.json' / 'manifest.json'}: missing: the checkpoint is not complete"
    )


def test_a_disk_that_fails_is_no_damage(tmp_path, monkeypatch):
    path = write(tmp_path, 7)

    def fail(file):
        raise OSError(5, "Input/output error", str(file))

    with monkeypatch.context() as patch:
        patch.setattr(state, "sha256", fail)
        assert (
            message(MachineError, verify, path) == f"{path / 'model.safetensors'}: cannot be read: Input/output error"
        )
        assert path not in state._verified

    def fail_without_a_name(file):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(state, "sha256", fail_without_a_name)
        assert message(MachineError, verify, path) == f"{path}: cannot be read: Input/output error"
    with monkeypatch.context() as patch:
        patch.setattr(state, "_check_files", lambda folder, *_: {"shards": 1, "step": 7})
        patch.setattr(state, "sha256", fail)
        words = message(MachineError, Checkpoint.load, path)
        assert words == f"{path / 'state.json'}: cannot be read: Input/output error"
        (path / "state.json").unlink()
        assert message(CheckpointError, Checkpoint.load, path) == (
            f"{path / 'state.json'}: cannot be read: No such file or directory"
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "has format 2, this version reads 3"),
        ({"format": 4, "more": 1}, "has format 4, this version reads 3"),
        ({"format": "3"}, "damaged: 'format' is '3'"),
        ({"format": ...}, "damaged: expected the fields format, step, shards, files, found files, shards, step"),
        (
            {"more": 1},
            "damaged: expected the fields format, step, shards, files, found files, format, more, shards, step",
        ),
        ({"step": "7"}, "damaged: 'step' is '7'"),
        ({"step": True}, "damaged: 'step' is True"),
        ({"step": 8}, "has step 8, which does not match the folder's name"),
        ({"shards": 1.0}, "damaged: 'shards' is 1.0"),
        ({"files": []}, "damaged: 'files' is []"),
    ],
)
def test_a_forged_manifest_is_refused(tmp_path, changes, words):
    path = write(tmp_path, 7)
    forge(path, **changes)
    for call in (verify, Checkpoint.load):
        assert message(CheckpointError, call, path) == f"{path / 'manifest.json'}: {words}"


@pytest.mark.parametrize("shards", [0, 2, 10**9, -1])
def test_another_number_of_shards_is_refused(tmp_path, shards):
    path = write(tmp_path, 7)
    forge(path, shards=shards)
    assert message(CheckpointError, verify, path).startswith(f"{path / 'manifest.json'}: damaged: expected the fields ")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (3, "damaged: {name!r} is 3"),
        ({"size": 3}, "damaged: expected the fields size, sha256, found size"),
        ({"size": "3", "sha256": ""}, "damaged: 'size' is '3'"),
        ({"size": 3, "sha256": None}, "damaged: 'sha256' is None"),
    ],
)
@pytest.mark.parametrize("name", ["state.json", "portable/config.json"])
def test_a_forged_entry_is_refused(tmp_path, name, entry, words):
    path = write(tmp_path, 7)
    files = unseal((path / "manifest.json").read_bytes(), "")["files"]
    forge(path, files={**files, name: entry})
    if entry == 3 and name.startswith("portable"):
        words = "damaged: expected the fields size, sha256, found 3"
    assert message(CheckpointError, verify, path) == f"{path / 'manifest.json'}: {words.format(name=name)}"


def test_files_outside_of_portable_are_known(tmp_path):
    path = write(tmp_path, 7)
    files = unseal((path / "manifest.json").read_bytes(), "")["files"]
    forge(path, files={**files, "other": files["state.json"]})
    listed = "model.safetensors, optimizer.safetensors, state.json"
    assert message(CheckpointError, verify, path).startswith(
        f"{path / 'manifest.json'}: damaged: expected the fields {listed}, found "
    )
    forge(path, files={name: entry for name, entry in files.items() if name != "state.json"})
    words = message(CheckpointError, verify, path)
    assert words.endswith(f"expected the fields {listed}, found model.safetensors, optimizer.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": ...}, "damaged: expected the fields config, data, random, best, bad_steps, evaluations_since_best, "
                         "steps, found config, data, random, best, bad_steps, evaluations_since_best"),
        ({"more": 1}, "damaged: expected the fields "),
        ({"config": []}, "damaged: 'config' is []"),
        ({"data": 3}, "damaged: 'data' is 3"),
        ({"data": None}, "damaged: 'data' is None"),
        ({"random": {}}, "damaged: 'random' is {}"),
        ({"best": 3}, "damaged: 'best' is 3"),
        ({"bad_steps": 0.5}, "damaged: 'bad_steps' is 0.5"),
        ({"bad_steps": False}, "damaged: 'bad_steps' is False"),
        ({"evaluations_since_best": None}, "damaged: 'evaluations_since_best' is None"),
        ({"steps": "x" * 200}, f"damaged: 'steps' is '{'x' * 79}"),
        ({"best": {"metric": "ndcg", "value": 0.5}},
         "damaged: expected the fields metric, value, step, found metric, value"),
        ({"best": {**BEST, "metric": 3}}, "damaged: 'metric' is 3"),
        ({"best": {**BEST, "value": "1"}}, "damaged: 'value' is '1'"),
        ({"best": {**BEST, "step": 0.5}}, "damaged: 'step' is 0.5"),
        ({"base": []}, "damaged: 'base' is []"),
        ({"base": {"config.json": 3}}, "damaged: 'config.json' is 3"),
    ],
)  # fmt: skip
def test_a_state_of_another_shape_is_refused(tmp_path, changes, words):
    content = {name: value for name, value in {**STATE, **changes}.items() if value is not ...}
    path = write(tmp_path, 7, content)
    assert verify(path) == 7
    found = message(CheckpointError, Checkpoint.load, path)
    assert found.startswith(f"{path / 'state.json'}: {words}")
    if not words.endswith("fields "):
        assert found == f"{path / 'state.json'}: {words}"


def test_best_may_be_an_integer(tmp_path):
    assert Checkpoint.load(write(tmp_path, 7, {**STATE, "best": {**BEST, "value": 1}})).state["best"]["value"] == 1


def test_a_state_that_is_no_object_is_refused(tmp_path):
    path = write(tmp_path, 7, [1] * 100)
    fields = ", ".join(STATE)
    found = repr([1] * 100)[:80]
    assert message(CheckpointError, Checkpoint.load, path) == (
        f"{path / 'state.json'}: damaged: expected the fields {fields}, found {found}"
    )


def test_a_state_that_is_not_json_is_refused(tmp_path):
    path = write(tmp_path, 7)
    (path / "state.json").write_text("{")
    files = unseal((path / "manifest.json").read_bytes(), "")["files"]
    forge(path, files={**files, "state.json": state._entry(path / "state.json")})
    words = message(CheckpointError, Checkpoint.load, path)
    assert words.startswith(f"{path}: damaged: {path / 'state.json'}")


# Which checkpoint is taken


@dataclass(frozen=True)
class Ranks(World):
    """Rank 0 of two, and what rank 1 reports. `calls`: the collectives, in order."""

    size: int = 2
    other: object = None
    calls: list = field(default_factory=list)

    def gather_object(self, value):
        self.calls.append("gather")
        return [value, self.other]

    def gather_number(self, number):
        return [number, number]

    def broadcast_object(self, value):
        self.calls.append("broadcast")
        return value


def flip(path):
    raw = bytearray((path / "state.json").read_bytes())
    raw[-2] ^= 1
    (path / "state.json").write_bytes(raw)


@pytest.fixture
def run(tmp_path):
    """A run with three checkpoints."""
    folder = tmp_path / "run"
    for step in (2, 10, 100_000_000):
        write(folder / "checkpoints", step)
    return folder


def test_auto_takes_the_newest_intact(run, tmp_path):
    warned = []
    assert find(run, "auto", warned.append).step == 100_000_000
    assert state._verified == {run / "checkpoints" / "step_100000000"}
    flip(run / "checkpoints" / "step_100000000")
    assert find(run, "auto", warned.append).step == 10
    damaged = run / "checkpoints" / "step_100000000" / "state.json"
    assert warned == [f"skipped a checkpoint: {damaged}: damaged: its checksum is not the one in manifest.json"]
    for step in ("00000010", "00000002"):
        flip(run / "checkpoints" / f"step_{step}")
    assert message(CheckpointError, find, run, "auto", warned.append) == (
        f"{run / 'checkpoints'}: none of the 3 checkpoints is intact; the run does not start over: "
        "move the folder away, or choose another save.dir"
    )
    assert find(tmp_path / "new", "auto", warned.append) is None
    assert len(warned) == 1 + 3


@pytest.mark.parametrize("as_text", [False, True])
def test_a_path_is_a_run_its_checkpoints_or_one_of_them(run, tmp_path, as_text):
    new, warned = tmp_path / "new", []
    for path, step in (
        (run, 100_000_000), (run / "checkpoints", 100_000_000), (run / "checkpoints" / "step_00000002", 2),
    ):  # fmt: skip
        assert find(new, str(path) if as_text else path, warned.append).step == step
    flip(run / "checkpoints" / "step_100000000")
    assert find(new, run, warned.append).step == 10
    assert len(warned) == 1
    # A checkpoint that was asked for is not replaced by another one.
    with pytest.raises(CheckpointError, match="its checksum is not the one"):
        find(new, run / "checkpoints" / "step_100000000", warned.append)
    assert len(warned) == 1


def test_paths_that_hold_no_checkpoint(tmp_path, run):
    new, nobody = tmp_path / "new", []
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert message(ConfigError, find, new, "", nobody.append) == (
        "resume: expected 'auto' or the path of a checkpoint, got ''"
    )
    for name, words in (
        ("file", "is a file"),
        ("absent", "no such folder"),
        ("absent/step_00000001", "no such folder"),
    ):
        path = tmp_path / name
        assert message(ConfigError, find, new, path, nobody.append) == f"resume: {path}: {words}; {_EXPECTED}"
    assert message(CheckpointError, find, new, tmp_path / "empty", nobody.append) == (
        f"{tmp_path / 'empty'}: holds no intact checkpoint; {_EXPECTED}"
    )
    long = tmp_path / ("x" * 300)
    assert message(ConfigError, find, new, long, nobody.append) == f"{long}: cannot be read: File name too long"
    assert nobody == []


def test_a_new_run_replaces_nothing(run, tmp_path):
    nobody = []
    new = tmp_path / "new"
    assert find(new, None, nobody.append) is None
    newest = run / "checkpoints" / "step_100000000"
    words = (
        f"{newest}: an earlier run left checkpoints here; continue it with --resume auto (resume='auto'), or choose "
        "another save.dir"
    )
    assert message(ConfigError, find, run, None, nobody.append) == words
    write(new / "elsewhere", 5)
    assert message(ConfigError, find, run, new / "elsewhere", nobody.append) == words
    assert find(run, run / "checkpoints" / "step_00000010", nobody.append).step == 10  # of this run
    (tmp_path / "link").symlink_to(run)
    assert find(run, tmp_path / "link" / "checkpoints", nobody.append).step == 100_000_000
    assert find(tmp_path / "link", run / "checkpoints", nobody.append).step == 100_000_000
    for name in ("final", "best"):
        (new / name).mkdir()
        assert message(ConfigError, find, new, None, nobody.append) == (
            f"{new / name}: an earlier run left its model here and no checkpoint to continue from; choose another "
            f"save.dir, or delete {new / name}"
        )
        with pytest.raises(ConfigError, match=f"{name}: an earlier run left its model"):
            find(new, run, nobody.append)
        (new / name).rmdir()
    assert nobody == []


def test_auto_without_checkpoints(tmp_path):
    warned, run = [], tmp_path / "run"
    (run / "best").mkdir(parents=True)
    assert find(run, "auto", warned.append) is None
    assert warned == [
        f"{run}: the run that left {run / 'best'} has no checkpoint; it starts from scratch and replaces that model"
    ]
    (run / "final").mkdir()
    with pytest.raises(ConfigError, match="final: an earlier run left its model here"):
        find(run, "auto", warned.append)
    (run / "best").rmdir()
    with pytest.raises(ConfigError, match="final: an earlier run left its model here"):
        find(run, "auto", warned.append)
    assert len(warned) == 1


@pytest.mark.parametrize("name", ["checkpoints", "final", "best", "checkpoints/step_00000003"])
@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_file_in_place_of_a_folder(tmp_path, name, resume):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    nobody = []
    words = "expected a folder; delete it, or choose another save.dir"
    assert message(ConfigError, find, tmp_path, resume, nobody.append) == f"{path}: is a file, {words}"
    path.unlink()
    path.symlink_to(tmp_path / "absent")
    assert message(ConfigError, find, tmp_path, resume, nobody.append) == (
        f"{path}: is a broken symbolic link, {words}"
    )
    path.unlink()
    (path.parent / "step_7").touch()  # no name of a checkpoint
    assert find(tmp_path, resume, nobody.append) is None


def test_a_disk_that_fails_takes_no_older_checkpoint(run, monkeypatch):
    nobody = []

    def fail(file):
        raise OSError(5, "Input/output error", str(file))

    monkeypatch.setattr(state, "sha256", fail)
    with pytest.raises(MachineError) as caught:
        find(run, "auto", nobody.append)
    path = run / "checkpoints" / "step_100000000" / "model.safetensors"
    assert str(caught.value) == f"{path}: cannot be read: Input/output error; nothing was deleted"
    assert (caught.value.errno, caught.value.filename) == (5, str(path))
    assert nobody == []


def test_what_one_rank_finds_holds_for_all(run):
    path = run / "checkpoints" / "step_00000010"
    damage, failure = CheckpointError("rank 1: damaged"), MachineError("rank 1: cannot be read", 5)
    warned = []
    world = Ranks()
    assert find(run, "auto", warned.append, world).step == 100_000_000
    assert world.calls == ["broadcast", "gather"]
    assert message(CheckpointError, state._load_together, path, Ranks(other=damage)) == "rank 1: damaged"
    assert message(MachineError, state._load_together, path, Ranks(other=failure)) == "rank 1: cannot be read"
    assert path not in state._verified
    flip(path)  # rank 0 reads state.json of four files, in order: the fourth is that of rank 1
    state._load_together(path, Ranks())
    state._load_together(path, Ranks(rank=0, size=2))
    with pytest.raises(CheckpointError, match="its checksum"):
        state._load_together(path, Ranks(rank=1))
    with pytest.raises(MachineError, match="rank 1: cannot be read"):  # it may be intact
        state._load_together(path, Ranks(rank=1, other=failure))
    assert message(MachineError, find, run, path, warned.append, Ranks(other=failure)) == (
        "rank 1: cannot be read; nothing was deleted"
    )
    assert message(CheckpointError, find, run, "auto", warned.append, Ranks(other=damage)).startswith(
        f"{run / 'checkpoints'}: none of the 3"
    )
    assert warned == ["skipped a checkpoint: rank 1: damaged"] * 3


def test_a_single_rank_reads_all(tmp_path):
    path = write(tmp_path, 7)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "portable/config.json"):
        before = (path / name).read_bytes()
        (path / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert message(CheckpointError, Checkpoint.load, path).startswith(f"{path / name}: damaged: its checksum")
        (path / name).write_bytes(before)


def test_a_name_that_no_file_can_have_is_damage(tmp_path):
    path = write(tmp_path, 7)
    manifest = unseal((path / "manifest.json").read_bytes(), "")["files"]
    name = f"portable/{'x' * 300}"
    forge(path, files={**manifest, name: {"size": 1, "sha256": ""}})
    assert message(CheckpointError, verify, path).startswith(f"{path}: no file can have the name 'portable/xxx")


def test_the_files_of_a_manifest_are_by_name(tmp_path):
    words = message(CheckpointError, state.checked_entries, tmp_path / "shard.json", ["model.safetensors"])
    assert words == f"{tmp_path / 'shard.json'}: damaged: expected files by name, found ['model.safetensors']"


@pytest.mark.parametrize("name", ["portable/../../x", "portable/.."])
def test_a_manifest_names_files_of_its_folder_only(tmp_path, name):
    path = write(tmp_path, 7)
    files = unseal((path / "manifest.json").read_bytes(), "")["files"]
    forge(path, files={**files, name: {"size": 1, "sha256": ""}})
    assert message(CheckpointError, verify, path) == (
        f"{path / 'manifest.json'}: may name files of its own folder only, got {name!r}"
    )


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    path = write(tmp_path, 7)
    (path / "portable" / "config.json").rename(tmp_path / "elsewhere")
    (path / "portable" / "config.json").symlink_to(tmp_path / "elsewhere")
    assert message(CheckpointError, verify, path) == (
        f"{path / 'portable' / 'config.json'}: is a link that leaves the folder"
    )


def test_only_the_first_rank_looks_at_the_folders(run, monkeypatch):
    """The others may see another file system; they get the candidates of rank 0."""
    chosen = [run / "checkpoints" / "step_00000002"]

    class Second(Ranks):
        def broadcast_object(self, value):
            assert value == []
            return chosen

    for name in ("_check_kinds", "_check_folder", "_check_start", "_candidates"):
        monkeypatch.setattr(state, name, None)
    for resume in ("auto", run, chosen[0]):
        assert find(run, resume, [].append, Second(rank=1)).step == 2


def test_an_error_of_another_rank_is_raised_here(run):
    class Failing(Ranks):
        def gather_number(self, number):
            return [number, 0]

        def gather_object(self, value):
            return [value, ("ConfigError: x", 2)]

    with pytest.raises(RankError, match="rank 1 failed with ConfigError: x"):
        find(run, "auto", [].append, Failing())


# Names


def test_folders_by_step(run):
    folder = run / "checkpoints"
    for name in ("step_3", "step_0000000x", "other", "step_00000005x", ".step_00000006"):
        (folder / name).mkdir()
    (folder / "step_00000004").touch()
    (folder / "step_99999999").mkdir()
    assert [path.name for path in state.checkpoints(folder)] == [
        "step_00000002", "step_00000010", "step_99999999", "step_100000000",
    ]  # fmt: skip
    assert [state.step_of(path) for path in state.checkpoints(folder)] == [2, 10, 99_999_999, 100_000_000]
    assert state.checkpoints(folder / "absent") == []


def test_leftovers_are_removed(run):
    kept = ["checkpoints/step_00000002", "final", ".partial", "checkpoints/.1.partial.other", "trial"]
    gone = [".12.partial.final", "checkpoints/.3.partial.step_00000007", "trial-12", ".shared-12"]
    for name in (*kept, *gone):
        (run / name).mkdir(exist_ok=True)
    (run / ".4.partial.metrics.jsonl").touch()
    state.remove_leftovers(run)
    assert all((run / name).exists() for name in kept)
    assert not any((run / name).exists() for name in (*gone, ".4.partial.metrics.jsonl"))


def test_a_leftover_that_cannot_be_removed_stays(run, monkeypatch):
    (run / "trial-1").mkdir()

    def fail(path):
        raise OSError(13, "Permission denied", str(path))

    monkeypatch.setattr(state, "remove", fail)
    state.remove_leftovers(run)
    assert (run / "trial-1").exists()


# Random states


def test_random_states_repeat():
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()

    random.gauss(0, 1), np.random.randn()  # leave a second normal value in the state
    states = json.loads(json.dumps(state.random_states()))
    assert set(states) == {"python", "numpy", "torch"}
    first = draw()
    assert draw() != first
    state.restore_random_states(states, "x")
    assert draw() == first
    state.restore_random_states({**states, "cuda": []}, "x")
    assert draw() == first


def test_random_states_of_gpus(monkeypatch):
    states, restored = [torch.tensor([1, 255], dtype=torch.uint8), torch.tensor([3], dtype=torch.uint8)], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append((device, state.tolist())))
    found = state.random_states()
    assert found["cuda"] == ["01ff", "03"]
    for count, expected in (
        (2, [(0, [1, 255]), (1, [3])]),
        (1, [(0, [1, 255])]),
        (0, []),
        (3, [(0, [1, 255]), (1, [3])]),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        restored.clear()
        state.restore_random_states(found, "x")
        assert restored == expected


@pytest.mark.parametrize("name", ["python", "numpy", "torch", "cuda"])
@pytest.mark.parametrize("value", [None, 3, [], "zz", [1, 2, 3], ["x", [1], 2], {}])
def test_damaged_random_states_are_named(monkeypatch, name, value):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    states = state.random_states() | {name: value}
    if name == "cuda" and value in ([], {}):
        return
    words = message(CheckpointError, state.restore_random_states, states, "some folder")
    assert words.startswith("some folder: the random states cannot be used: ")
    assert len(words) > len("some folder: the random states cannot be used: ")
    del states[name]
    if name != "cuda":
        assert message(CheckpointError, state.restore_random_states, states, "x") == (
            f"x: the random states cannot be used: {name!r}"
        )


# Retention


def left(folder):
    return [state.step_of(path) for path in state.checkpoints(folder)]


def test_the_newest_are_kept(tmp_path):
    for step in range(1, 7):
        write(tmp_path, step)
    state.retain(tmp_path, 6, 3)
    assert left(tmp_path) == [4, 5, 6]
    state.retain(tmp_path, 5, 1)
    assert left(tmp_path) == [5, 6]
    state.retain(tmp_path, 5, 1)
    assert left(tmp_path) == [5, 6]


def test_later_checkpoints_than_that_of_the_start_are_deleted(tmp_path, caplog):
    for step in range(1, 8):
        write(tmp_path, step)
    flip(tmp_path / "step_00000006")
    state.delete_abandoned(tmp_path, 3, 5)  # the checkpoint of step 5 will be replaced
    assert left(tmp_path) == [1, 2, 3, 5, 6]
    assert "step_00000006/state.json: damaged" in caplog.text
    state.delete_abandoned(tmp_path, 6, 7)
    assert left(tmp_path) == [1, 2, 3, 5, 6]


def test_what_is_damaged_is_not_deleted(tmp_path, caplog):
    for step in range(1, 5):
        write(tmp_path, step)
    flip(tmp_path / "step_00000001")
    state.retain(tmp_path, 4, 1)
    assert left(tmp_path) == [1, 4]
    path = tmp_path / "step_00000001" / "state.json"
    assert caplog.record_tuples == [
        (
            "pyqemb", 30,
            f"an old checkpoint is left in place: {path}: damaged: its checksum is not the one in manifest.json",
        )
    ]  # fmt: skip


def test_what_was_verified_is_not_read_again(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        write(tmp_path, step)
    verify(tmp_path / "step_00000001")
    monkeypatch.chdir(tmp_path)
    flip(tmp_path / "step_00000001")
    flip(tmp_path / "step_00000002")
    from pathlib import Path

    state.retain(Path(), 3, 1)
    assert left(tmp_path) == [2, 3]


def test_a_checkpoint_that_cannot_be_read_is_not_deleted(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        write(tmp_path, step)

    def fail(file):
        raise OSError(5, "Input/output error", str(file))

    monkeypatch.setattr(state, "sha256", fail)
    state.retain(tmp_path, 2, 1)
    assert left(tmp_path) == [1, 2]
    assert "an old checkpoint is left in place" in caplog.text
    assert issubclass(CheckpointError, DataError)
    assert replace(Checkpoint(tmp_path, 1, {}, {}, {})).digest == ""
    assert os.path.exists(tmp_path)
