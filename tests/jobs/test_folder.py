"""The folder of a job: whose parts it holds, how they become the output, and who works in it."""

import multiprocessing

import numpy as np
import pytest

from pyqemb.data.files import locked, one_at_a_time
from pyqemb.data.sealed import seal
from pyqemb.errors import ConfigError, DataError
from pyqemb.jobs.folder import (
    check_complete,
    claim,
    describe_output,
    digest_of,
    numbers,
    parts_folder,
    read_manifest,
    read_output,
)  # fmt: skip
from pyqemb.jobs.parts import VectorPart
from pyqemb.jobs.tasks import Task


@pytest.fixture
def folder(tmp_path):
    place = parts_folder(tmp_path / "x.npy")
    place.mkdir()
    return place


def test_a_job_claims_its_folder(folder):
    facts = {"input": "a\udcff", "dim": None}
    job = claim(folder, facts)
    assert claim(folder, facts) == job == digest_of(read_manifest(folder))
    assert read_manifest(folder) == {"input": "a\\udcff", "dim": None}
    other = claim(folder, {**facts, "dim": 8})  # there are no parts yet
    assert other != job
    (folder / "00000000.npy").touch()
    with pytest.raises(ConfigError, match=r"holds parts of another job \(dim was 8, now None\); remove it"):
        claim(folder, facts)


def test_a_task_replaces_no_manifest(folder):
    claim(folder, {"dim": 8}, shared=True)
    with pytest.raises(ConfigError, match=r"holds parts of another job \(dim was 8, now 9\)"):
        claim(folder, {"dim": 9}, shared=True)


def test_the_output_is_described_once(folder):
    describe_output(folder, "encode", "job", {"precision": "int8"})
    describe_output(folder, "encode", "job", {"precision": "int8"})
    assert read_output(folder, "job") == ("encode", {"precision": "int8"})
    with pytest.raises(ConfigError, match="another task has precision 'int8', this one 'float32'"):
        describe_output(folder, "encode", "job", {"precision": "float32"})
    with pytest.raises(DataError, match=r"output\.json: belongs to another job than the parts"):
        read_output(folder, "another")
    describe_output(folder, "encode", "another", {"precision": "float32"})  # of a job that left no parts
    assert read_output(folder, "another") == ("encode", {"precision": "float32"})


def test_descriptions_that_are_refused(folder):
    with pytest.raises(ConfigError, match=r"holds no finished work of tasks; run the commands that began it again"):
        read_output(folder, "job")
    good = {"format": 1, "kind": "encode", "job": "job", "settings": {}}
    for change in ({"format": 2}, {"kind": 3}, {"settings": []}):
        (folder / "output.json").write_bytes(seal({**good, **change}))
        with pytest.raises(DataError, match=r"output\.json: of another version of pyqemb, or damaged"):
            read_output(folder, "job")
    (folder / "output.json").write_bytes(seal(good)[:-2])
    with pytest.raises(DataError, match=r"output\.json: .*; remove .*x\.npy\.parts to start over"):
        read_output(folder, "job")


def test_missing_and_damaged_parts_are_named(folder, caplog):
    parts = [VectorPart(folder / f"{number:08}.npy", "job", "texts") for number in range(7)]
    for number in (0, 2, 3, 6):
        parts[number].write(np.zeros((1, 2), np.float32), None)
    with pytest.raises(DataError, match=r"x\.npy\.parts: 3 of 7 parts are missing or damaged: 1, 4-5; run their tasks"):
        check_complete(folder, parts)
    assert not caplog.text
    (folder / ".lock.tasks-3.task-0").touch()
    parts[3].path.write_bytes(b"")
    with pytest.raises(DataError, match="4 of 7 parts are missing or damaged: 1, 3-5; run tasks 0-2 of 3 again"):
        check_complete(folder, parts)
    assert "00000003.npy: damaged: it does not match its checksum" in caplog.text
    for part in parts[3:]:
        part.write(np.zeros((1, 2), np.float32), None)
    with pytest.raises(DataError, match="1 of 7 parts are missing or damaged: 1; run task 1 of 3 again"):
        check_complete(folder, parts)
    (folder / ".lock.tasks-4.task-0").touch()
    with pytest.raises(DataError, match="run their tasks again"):
        check_complete(folder, parts)
    parts[1].write(np.zeros((1, 2), np.float32), None)
    check_complete(folder, parts)


def test_numbers():
    assert numbers([]) == ""
    assert numbers([4]) == "4"
    assert numbers([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert numbers(range(0, 40, 2), 3) == "0, 2, 4, ..."


def hold(folder, member, held, release):
    with locked(folder, "encode", member):
        held.set()
        release.wait(60)


@pytest.fixture
def holder(folder):
    """Locks the folder in another process, and returns its pid."""
    context, running = multiprocessing.get_context("fork"), []

    def start(member, folder=folder):
        held, release = context.Event(), context.Event()
        process = context.Process(target=hold, args=(folder, member, held, release))
        process.start()
        running.append((process, release))
        assert held.wait(60)
        return process.pid

    yield start
    for process, release in running:
        release.set()
        process.join()
        assert process.exitcode == 0


@pytest.mark.promise("R9", "two tasks of an encode job with the same number, or of two numbers of tasks")
def test_who_excludes_whom(folder, holder):
    pid = holder(Task(1, 3).member())
    with locked(folder, "encode", Task(0, 3).member()):
        pass
    for member, words in (
        (Task(1, 3).member(), f"task-1 of tasks-3, pid {pid} on"),
        (Task(0, 2).member(), f"task-1 of tasks-3, pid {pid} on"),
        (None, f"task-1 of tasks-3, pid {pid} on"),
    ):
        with (
            pytest.raises(ConfigError, match=rf"x\.npy\.parts: another encode is running here: {words}"),
            locked(folder, "encode", member),
        ):
            raise AssertionError


def test_a_job_without_tasks_excludes_tasks(folder, holder):
    pid = holder(None)
    for member in (None, Task(0, 2).member()):
        with (
            pytest.raises(ConfigError, match=f"another encode is running here: pid {pid} on"),
            locked(folder, "encode", member),
        ):
            raise AssertionError


def test_locks_of_ended_tasks_do_not_count(folder):
    with locked(folder, "encode", Task(1, 3).member()):
        pass
    for member in (Task(0, 2).member(), None):
        with locked(folder, "encode", member):
            pass
    assert {path.name for path in folder.iterdir()} == {".lock", ".lock.tasks-3.task-1", ".lock.tasks-2.task-0"}


def test_a_folder_in_which_nothing_was_done_is_removed(tmp_path):
    for member in (None, Task(0, 2).member()):
        with pytest.raises(KeyboardInterrupt), locked(tmp_path / "new", "encode", member):
            raise KeyboardInterrupt
        assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "old", "encode", Task(0, 2).member()):
        raise KeyboardInterrupt
    assert (tmp_path / "old").exists()


def test_the_folder_of_another_task_stays(tmp_path, holder):
    def fail():
        with locked(tmp_path / "new", "encode", Task(0, 2).member()):
            holder(Task(1, 2).member(), tmp_path / "new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        ".lock", ".lock.tasks-2.task-0", ".lock.tasks-2.task-1"
    }  # fmt: skip


def work(folder, number):
    for _ in range(50):
        with one_at_a_time(folder):
            count = int((folder / "count").read_text())
            (folder / "count").write_text(f"{count + 1}")


def test_one_at_a_time(folder):
    (folder / "count").write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(folder, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (folder / "count").read_text() == "150"
