"""The threads that write checkpoints, with threads in the place of ranks: what they agree on, and every failure."""

import errno
import logging
import threading
import time
from contextlib import ExitStack

import pytest
import torch

from pyqemb.data import files
from pyqemb.data.sealed import seal
from pyqemb.errors import MachineError, RankError
from pyqemb.model.checkpoint import sha256
from pyqemb.model.shard_files import Slice
from pyqemb.training import saving, state
from pyqemb.training.parallel.world import World
from pyqemb.training.saving import Saver
from pyqemb.training.state import Checkpoint, checkpoints, verify

RUN_STATE = {
    "config": {}, "data": "\u00e4", "random": [], "best": None, "bad_steps": 0, "evaluations_since_best": 0, "steps": 5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(saving, "_PATIENCE", 0.5)
    monkeypatch.setattr(state, "_verified", set())


def portable(folder):
    (folder / "config.json").write_text("{}")


def start(saver, step, weights=None, copy=False, **options):
    weights = {"w": torch.full((2, 2), float(step))} if weights is None else weights
    saver.start(step, weights, {"w.m": torch.ones(2, 2)}, RUN_STATE, options.get("write_portable", portable), copy)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_one_rank_writes_one_after_the_other(tmp_path):
    saver = Saver(tmp_path, 2, World())
    assert (saver.folder, saver.keep, saver.world) == (tmp_path, 2, World())
    assert saver.poll() is None
    assert saver.wait() is None
    for step in (1, 2, 3):
        start(saver, step)
        with pytest.raises(AssertionError):
            start(saver, step)
        assert saver.wait() == tmp_path / f"step_{step:08}"
        assert saver.poll() is None
        assert tmp_path / f"step_{step:08}" in state._verified
    assert names(tmp_path) == ["step_00000002", "step_00000003"]
    found = Checkpoint.load(tmp_path / "step_00000003")
    assert (found.step, found.state) == (3, RUN_STATE)
    assert found.weights["w"].equal(torch.full((2, 2), 3.0))
    assert found.optimizer["w.m"].equal(torch.ones(2, 2))
    assert names(found.folder) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "portable", "state.json",
    ]  # fmt: skip
    assert names(found.folder / "portable") == ["config.json"]


def held_back(monkeypatch):
    """Writing waits until the event is set."""
    event, real = threading.Event(), state.write_shard

    def write_shard(*args):
        assert event.wait(30)
        return real(*args)

    monkeypatch.setattr(state, "write_shard", write_shard)
    return event


@pytest.mark.parametrize("copy", [True, False])
def test_a_copy_is_of_the_step(tmp_path, monkeypatch, copy):
    event, saver, weight = held_back(monkeypatch), Saver(tmp_path, 1, World()), torch.zeros(2, 2)
    start(saver, 1, {"w": weight}, copy)
    assert saver.poll() is None
    thread = saver._save.thread
    assert thread.daemon
    assert thread.name == "checkpoint"
    assert names(tmp_path) != ["step_00000001"]
    weight += 1
    event.set()
    thread.join()
    assert saver._save.shards == []  # the copies are freed
    assert saver.poll() == tmp_path / "step_00000001"
    assert Checkpoint.load(tmp_path / "step_00000001").weights["w"].equal(torch.full((2, 2), 0.0 if copy else 1.0))


def test_an_error_removes_the_partial_checkpoint(tmp_path, monkeypatch):
    saver = Saver(tmp_path, 2, World())
    start(saver, 1)
    saver.wait()

    def full(folder, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "model.safetensors"))

    with monkeypatch.context() as patch:
        patch.setattr(state, "write_shard", full)
        start(saver, 2)
        with pytest.raises(MachineError) as caught:
            saver.wait()
    target = tmp_path / "step_00000002"
    assert str(caught.value) == (
        f"{target}: could not be written: No space left on device; older checkpoints are intact"
    )
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(target))
    assert names(tmp_path) == ["step_00000001"]
    assert saver.poll() is None
    start(saver, 3)
    assert saver.wait() == tmp_path / "step_00000003"


def test_an_error_before_the_thread_starts(tmp_path):
    saver = Saver(tmp_path, 2, World())

    def fail(folder):
        raise OSError(errno.EIO, "Input/output error", str(folder / "x"))

    with pytest.raises(MachineError) as caught:
        start(saver, 1, write_portable=fail)
    target = tmp_path / "step_00000001"
    assert str(caught.value) == f"{target}: could not be written: Input/output error; older checkpoints are intact"
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(target))
    assert names(tmp_path) == []
    assert saver.poll() is None

    def wrong(folder):
        raise KeyError("x")

    with pytest.raises(KeyError):
        start(saver, 1, write_portable=wrong)
    assert names(tmp_path) == []


def test_an_error_that_is_not_of_the_machine_is_raised_as_it_is(tmp_path, monkeypatch):
    saver = Saver(tmp_path, 2, World())

    def wrong(*_):
        raise ZeroDivisionError("x")

    monkeypatch.setattr(state, "write_shard", wrong)
    start(saver, 1)
    with pytest.raises(ZeroDivisionError):
        saver.wait()
    assert names(tmp_path) == []


def test_leaving_completes_the_checkpoint(tmp_path, monkeypatch, caplog):
    saver = Saver(tmp_path, 2, World())
    saver.leave()
    event = held_back(monkeypatch)
    start(saver, 1)
    threading.Timer(0.2, event.set).start()
    saver.leave()
    assert verify(tmp_path / "step_00000001") == 1
    assert saver._save is None
    assert caplog.records == []


def test_leaving_after_an_error(tmp_path, monkeypatch, caplog):
    saver = Saver(tmp_path, 2, World())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state, "write_shard", full)
    start(saver, 1)
    saver.leave()
    assert names(tmp_path) == []
    words = f"{tmp_path / 'step_00000001'}: could not be written: No space left on device; older checkpoints are intact"
    assert caplog.record_tuples == [("pyqemb", logging.ERROR, words)]


# Two ranks


class Pair:
    """Two threads as ranks; each collective waits for both."""

    def __init__(self):
        self.meeting, self.values = threading.Barrier(2, timeout=30), [None, None]

    def gather(self, rank, value):
        self.values[rank] = value
        self.meeting.wait()
        found = list(self.values)
        self.meeting.wait()
        return found


class Rank(World):
    def __init__(self, rank, pair):
        super().__init__(rank, 2)
        object.__setattr__(self, "pair", pair)

    def gather_object(self, value):
        return self.pair.gather(self.rank, value)

    gather_number = gather_object

    def broadcast_object(self, value):
        return self.gather_object(value)[0]

    def barrier(self):
        self.gather_object(None)


WHOLE = torch.arange(6.0).view(3, 2)
ROWS = slice(0, 2), slice(2, 3)


def in_both(tmp_path, monkeypatch, body, count=2):
    """body(saver, rank, weights) in two threads; returns what each returns or raises."""
    pair, results = Pair(), [None, None]
    monkeypatch.setattr(saving, "_num_shards", lambda weights: count)
    monkeypatch.setattr(
        Slice,
        "of",
        classmethod(lambda cls, x: cls(x[1], x[0], (3, 2)) if isinstance(x, tuple) else cls(x, 0, tuple(x.shape))),
    )

    def run(rank):
        try:
            weights = {"w": (ROWS[rank].start, WHOLE[ROWS[rank]].clone()) if count == 2 else WHOLE}
            results[rank] = body(Saver(tmp_path, 2, Rank(rank, pair)), rank, weights)
        except BaseException as error:
            results[rank] = error
            pair.meeting.abort() if isinstance(error, threading.BrokenBarrierError) else None

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def save(saver, weights, step=1):
    saver.start(step, weights, {"o": torch.ones(2)}, RUN_STATE, portable, False)


def test_two_ranks_write_one_checkpoint(tmp_path, monkeypatch):
    def body(saver, rank, weights):
        save(saver, weights)
        return saver.wait()

    assert in_both(tmp_path, monkeypatch, body) == [tmp_path / "step_00000001"] * 2
    found = Checkpoint.load(tmp_path / "step_00000001")
    assert found.weights["w"].equal(WHOLE)
    assert found.optimizer["o"].equal(torch.ones(2))
    shards = [f"{kind}-0000{n}-of-00002.safetensors" for kind in ("model", "optimizer") for n in (1, 2)]
    assert names(found.folder) == ["manifest.json", *shards, "portable", "state.json"]


def test_a_rank_without_a_shard_writes_nothing(tmp_path, monkeypatch):
    def body(saver, rank, weights):
        save(saver, weights)
        shards = len(saver._save.shards) if rank else 0
        return shards, saver.wait()

    assert in_both(tmp_path, monkeypatch, body, 1) == [(0, tmp_path / "step_00000001")] * 2
    assert "model.safetensors" in names(tmp_path / "step_00000001")


def test_the_first_rank_waits_for_the_others(tmp_path, monkeypatch):
    real = state.write_shard

    def write_shard(folder, number, *rest):
        if number == 1:
            time.sleep(0.3)
        return real(folder, number, *rest)

    monkeypatch.setattr(state, "write_shard", write_shard)

    def body(saver, rank, weights):
        save(saver, weights)
        first = saver.poll()
        return first, saver.wait()

    assert in_both(tmp_path, monkeypatch, body) == [(None, tmp_path / "step_00000001")] * 2


def test_the_first_rank_may_complete_the_checkpoint_as_soon_as_the_report_is_there(tmp_path, monkeypatch):
    """The other rank does nothing more in the folder, which is renamed: it was still syncing it."""
    real = files.fsync_folder

    def fsync_folder(folder):
        if (folder / "shard-00001.json").exists():
            time.sleep(0.5)
        real(folder)

    monkeypatch.setattr(files, "fsync_folder", fsync_folder)

    def body(saver, rank, weights):
        save(saver, weights)
        return saver.wait()

    assert in_both(tmp_path, monkeypatch, body) == [tmp_path / "step_00000001"] * 2


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_of_one_rank_is_raised_on_both(tmp_path, monkeypatch, bad):
    real = state.write_shard

    def write_shard(folder, number, *rest):
        if number == bad:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(folder, number, *rest)

    monkeypatch.setattr(state, "write_shard", write_shard)

    def body(saver, rank, weights):
        save(saver, weights)
        saver.wait()

    results = in_both(tmp_path, monkeypatch, body)
    words = f"{tmp_path / 'step_00000001'}: could not be written: No space left on device; older checkpoints are intact"
    assert type(results[bad]) is MachineError
    assert str(results[bad]) == words
    assert type(results[1 - bad]) is RankError
    assert str(results[1 - bad]) == f"rank {bad} failed with MachineError: {words}"
    assert names(tmp_path) == []


def test_ranks_that_do_not_share_the_folder(tmp_path, monkeypatch):
    """Rank 0 sees the report and not the files, or files of another size."""
    for damage in ("unlink", "cut", "folder"):
        real = state.write_shard

        def write_shard(folder, number, *rest, real=real, damage=damage):
            files = real(folder, number, *rest)
            path = folder / "model-00002-of-00002.safetensors"
            if number == 1 and damage == "cut":
                path.write_bytes(path.read_bytes()[:-1])
            elif number == 1:
                path.unlink()
                if damage == "folder":
                    path.mkdir()
            return files

        def body(saver, rank, weights):
            save(saver, weights)
            saver.wait()

        with monkeypatch.context() as patch:
            patch.setattr(state, "write_shard", write_shard)
            results = in_both(tmp_path, monkeypatch, body)
        assert str(results[0]) == (
            f"{tmp_path / 'step_00000001'}: could not be written: model-00002-of-00002.safetensors of rank 1 is not "
            "there: all ranks must share the folder save.dir; older checkpoints are intact"
        )
        assert isinstance(results[1], RankError)
        assert names(tmp_path) == []


def test_a_first_rank_that_leaves_waits_only_a_while(tmp_path, monkeypatch, caplog):
    """Rank 1 was killed: its report never comes."""

    def body(saver, rank, weights):
        save(saver, weights) if rank == 0 else saver.start(1, {}, {}, RUN_STATE, portable, False)
        if rank == 1:
            return None
        start = time.monotonic()
        saver.leave()
        return time.monotonic() - start

    real = state.write_shard
    monkeypatch.setattr(
        state,
        "write_shard",
        lambda folder, number, *rest: real(folder, number, *rest) if number == 0 else time.sleep(3),
    )
    waited, _ = in_both(tmp_path, monkeypatch, body)
    assert 0.5 <= waited < 3
    words = f"{tmp_path / 'step_00000001'}: could not be written: {tmp_path / 'step_00000001'}: rank 1 has not written "
    assert caplog.records[0].getMessage() == words + "its shard; older checkpoints are intact"
    assert names(tmp_path) == []


def alone(tmp_path, number=0, count=2):
    return saving._Save(tmp_path / "target", tmp_path, 1, number, count, 2, ExitStack(), [])


def test_reports(tmp_path):
    save = alone(tmp_path)
    assert save._report(1) == tmp_path / "shard-00001.json"
    (tmp_path / "x").write_bytes(b"123")
    entry = {"size": 3, "sha256": sha256(tmp_path / "x")}
    save._report(7).write_bytes(seal({"files": {"x": entry}}))
    assert save._files_of(7) == {"x": entry}
    assert names(tmp_path) == ["x"]


def test_a_report_that_comes_late_is_waited_for(tmp_path, monkeypatch):
    save, slept = alone(tmp_path), []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            save._report(1).write_bytes(seal({"files": {}}))

    monkeypatch.setattr(saving.time, "sleep", sleep)
    save.deadline = time.monotonic() + 60
    assert save._files_of(1) == {}
    assert slept == [0.02] * 3


def test_the_status_of_a_thread(tmp_path):
    save = alone(tmp_path)
    assert save.deadline == float("inf")
    event = threading.Event()
    save.thread = threading.Thread(target=event.wait)
    save.thread.start()
    assert save.status == saving._RUNNING
    event.set()
    save.thread.join()
    assert save.status == saving._DONE
    save.error = KeyError()
    assert save.status == saving._FAILED


def test_the_number_of_shards(monkeypatch):
    from types import SimpleNamespace

    assert saving._num_shards({"a": torch.ones(1)}) == 1
    assert saving._num_shards({}) == 1
    mesh = SimpleNamespace(size=lambda: 4)
    monkeypatch.setattr(saving, "is_sharded", lambda x: not isinstance(x, torch.Tensor))
    sharded = SimpleNamespace(device_mesh=mesh)
    assert saving._num_shards({"a": torch.ones(1), "b": sharded}) == 4


def test_old_checkpoints_are_deleted_by_the_first_rank_alone(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(state, "retain", lambda *args: kept.append(args))
    saver = Saver(tmp_path, 5, World())
    start(saver, 3)
    saver.wait()
    assert kept == [(tmp_path, 3, 5)]
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000003"]
