"""How far a job is: what processes say, what is on disk, and what a process that died could not say."""

import json

import pytest

from pyqemb.cli import main
from pyqemb.data.files import locked
from pyqemb.data.sealed import seal, unseal
from pyqemb.encoding import encode_file
from pyqemb.errors import DataError
from pyqemb.jobs import status
from pyqemb.jobs.status import Reporter, read_status
from pyqemb.jobs.tasks import Task
from pyqemb.testing.tiny import tiny_embedder


@pytest.fixture
def clock(monkeypatch):
    """A time that the test sets."""
    now = [1000.0]
    monkeypatch.setattr(status.time, "time", lambda: now[0])
    return now


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "x.npy.parts"
    place.mkdir()
    return place


def test_two_tasks(folder, clock):
    first, second = Task(0, 2), Task(1, 2)
    with (
        locked(folder, "encode", first.member()), locked(folder, "encode", second.member()),
        Reporter(folder, "encode", first) as one, Reporter(folder, "encode", second) as two,
    ):  # fmt: skip
        for report in (one, two):
            report.stage("encode", "[0-9]*.npy", 12, is_estimate=True)
        assert read_status(folder.with_suffix("")).line() == "encode: 0 of about 12 parts, 0 %; tasks: 2 running"
        for number in range(4):
            (folder / f"{number:08}.npy").touch()
            one.advance()
        assert read_status(folder.with_suffix("")).rate == 0  # not written yet
        clock[0] += 60
        for report, parts in ((one, 0), (two, 2)):
            report.advance(parts)
        found = read_status(folder.with_suffix(""))
        assert (found.done, found.total, found.is_estimate) == (4, 12, True)
        assert found.rate == pytest.approx(0.1)
        assert found.line() == (
            "encode: 4 of about 12 parts, 33 %, 6.0 parts a minute, about 0:01:20 left; tasks: 2 running"
        )
    assert read_status(folder.with_suffix("")).line() == "encode: 4 of about 12 parts, 33 %; tasks: 2 done"


def fail(folder, error):
    with Reporter(folder, "mine", Task(0, 3)) as report:
        report.stage("search", "search-*.npy", None)
        raise error


def test_a_process_that_fails_stops_or_is_lost(folder, clock):
    for error in (ValueError("no\nluck"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail(folder, error)
        found = read_status(folder.with_suffix(""))
        if isinstance(error, ValueError):
            [line] = found.failures()
            assert line.startswith("task 0 of 3 failed on ")
            assert line.endswith(": ValueError: no\\nluck")
        else:
            assert found.failures() == []
            assert found.line() == "mine (search): 0 parts; tasks: 1 stopped"
    Reporter(folder, "mine", Task(1, 3)).stage("search", "search-*.npy", 3)
    found = read_status(folder.with_suffix(""))
    assert found.line() == "mine (search): 0 of 3 parts, 0 %; tasks: 1 lost, 1 stopped"
    [line] = found.failures()
    assert line.startswith("task 1 of 3 is lost: it ended on ")
    with locked(folder, "mine", Task(1, 3).member()):
        assert read_status(folder.with_suffix("")).failures() == []


def test_the_newest_stage_counts(folder, clock):
    for task, stage, files in ((0, "search", "search-*.npy"), (1, "encode", "[dq]*.npy")):
        clock[0] -= 10
        with Reporter(folder, "mine", Task(task, 2)) as report:
            report.stage(stage, files, 5)
            report.advance()
    (folder / "search-00000000.npy").touch()
    found = read_status(folder.with_suffix(""))
    assert (found.stage, found.done, found.total) == ("search", 1, 5)


def test_an_error_while_writing_does_not_hide_the_first(folder, monkeypatch):
    def fail(path):
        raise OSError(28, "No space left on device")

    def work():
        with Reporter(folder, "encode", None) as report:
            report.stage("encode", "*.npy", 1)
            monkeypatch.setattr(status, "atomic_file", fail)
            raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        work()


@pytest.mark.parametrize("files", ["a**b", ".", "..", "[", "[]", "*", ""])
def test_any_pattern_of_names_can_be_counted(folder, files):
    with Reporter(folder, "encode", None) as report:
        report.stage("encode", files, 9)
    (folder / "a-b").touch()
    assert read_status(folder.with_suffix("")).done == {"a**b": 1, "*": 2}.get(files, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "of another version of pyqemb"), ({"made": "1"}, "damaged: .*made"),
        ({"state": "dancing"}, "damaged: .*state"), ({"more": 1}, "damaged: .*more"), ({"total": 1.5}, "damaged"),
        ({"files": "../*"}, "damaged: files must be a pattern"), ({"total": -1}, "damaged: .*total"),
    ],
)  # fmt: skip
def test_files_that_are_refused(folder, change, words):
    with Reporter(folder, "encode", None) as report:
        report.stage("encode", "*.npy", 1)
    path = folder / "status-alone.json"
    path.write_bytes(seal({**unseal(path.read_bytes(), ""), **change}))
    with pytest.raises(DataError, match=rf"status-alone\.json: {words}"):
        read_status(folder.with_suffix(""))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"status-alone\.json: not JSON"):
        read_status(folder.with_suffix(""))


def test_the_command_line(tmp_path, capsys):
    model = tiny_embedder().save_pretrained(tmp_path / "m")
    (tmp_path / "texts.txt").write_text("".join(f"text {i}\n" for i in range(20)))
    out = str(tmp_path / "x.npy")
    assert main(["status", out]) == 3
    assert "x.npy.parts: holds no job that has begun\n" in capsys.readouterr().err
    encode_file(model, tmp_path / "texts.txt", out, rows_per_part=3, tasks=2, task=1)
    assert main(["status", out]) == 0
    assert capsys.readouterr().out == "encode: 3 of 7 parts, 42 %; tasks: 1 done\n"
    assert main(["status", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["done"], found["total"], found["seconds_left"]) == ("encode", 3, 7, None)
    assert found["workers"][0]["state"] == "done"
    assert found["workers"][0]["made"] == 3

    def stop(rows, size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_file(model, tmp_path / "texts.txt", tmp_path / "y.npy", rows_per_part=3, on_progress=stop)
    assert main(["status", str(tmp_path / "y.npy")]) == 0
    assert capsys.readouterr().out == "encode: 2 of 7 parts, 28 %; process: 1 stopped\n"
    encode_file(model, tmp_path / "texts.txt", tmp_path / "y.npy", rows_per_part=3)
    assert main(["status", str(tmp_path / "y.npy")]) == 3
    assert "y.npy exists, so the job may be finished already" in capsys.readouterr().err
