"""Files and folders that are there in full or not at all, and what is said where the machine refuses."""

import errno
import os
import pickle
import sqlite3
import subprocess
import sys

import numpy as np
import pytest

from pyqemb.data import files
from pyqemb.data.files import atomic_file, atomic_folder, check_writable
from pyqemb.data.machine import errno_of, raise_if_machine, reading, writing
from pyqemb.errors import ConfigError, DataError, MachineError, PyqembError


def test_errors_of_the_machine_while_reading_name_the_file():
    with pytest.raises(MachineError, match="m: cannot be read: Input/output error"), reading("m"):
        raise OSError(errno.EIO, "what the library says")
    for error in (FileNotFoundError(errno.ENOENT, "no", "m"), ValueError("x"), DataError("y")):
        with pytest.raises(type(error)) as found, reading("m"):
            raise error
        assert found.value is error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EMFILE])
def test_errors_while_writing_name_the_target_and_leave_the_old_one(tmp_path, number):
    path, folder = tmp_path / "a" / "x.json", tmp_path / "model"
    with atomic_file(path) as temporary:
        temporary.write_text("old")
    with atomic_folder(folder) as temporary:
        (temporary / "x").write_text("old")
    for target, atomic in ((path, atomic_file), (folder, atomic_folder)):
        with pytest.raises(MachineError) as caught, atomic(target) as temporary:
            raise OSError(number, os.strerror(number), str(temporary))
        assert str(caught.value) == f"{target}: cannot be written: {os.strerror(number)}"
        assert caught.value.errno == number
        assert isinstance(caught.value, OSError)
        assert caught.value.exit_code == 74
    assert path.read_text() == (folder / "x").read_text() == "old"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "model", "x", "x.json"]


def test_errors_of_other_libraries(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    import safetensors.torch
    import torch

    full = tmp_path / "full"
    full.symlink_to("/dev/full")  # pyarrow removes what it could not write: the link, not the device
    with pytest.raises(MachineError, match=r"x: cannot be written: No space left on device$"), writing(tmp_path / "x"):
        pq.write_table(pa.table({"a": np.random.rand(100_000)}), full)
    with pytest.raises(MachineError, match="x: cannot be written: No such file"), writing(tmp_path / "x"):
        safetensors.torch.save_file({"a": torch.zeros(9)}, tmp_path / "none" / "y")
    for words, number in (("database or disk is full", errno.ENOSPC), ("disk I/O error", errno.EIO)):
        assert errno_of(sqlite3.OperationalError(words)) == number
    assert errno_of(RuntimeError("unable to open file <a> in read-only mode: Input/output error (5)")) == errno.EIO
    assert errno_of(RuntimeError("unable to mmap 8 bytes from file <a>: Cannot allocate memory (12)")) == errno.ENOMEM
    assert errno_of(RuntimeError("unable to go on (5)")) is None
    assert errno_of(OSError("Input/output error (os error 5)")) == errno.EIO
    assert errno_of(OSError("Not a gzipped file")) is None
    assert errno_of(ValueError("os error 28")) is None
    assert errno_of(sqlite3.OperationalError("syntax")) is None


def test_errors_about_another_file_pass(tmp_path):
    with pytest.raises(FileNotFoundError, match="input"), atomic_file(tmp_path / "out"):
        (tmp_path / "input").read_bytes()
    with pytest.raises(ValueError, match="other"), atomic_file(tmp_path / "out"):
        raise ValueError("other")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_vanishes_is_an_error_of_the_machine(tmp_path):
    with (
        pytest.raises(MachineError, match="out: cannot be written: No such file"),
        atomic_file(tmp_path / "out") as part,
    ):
        part.unlink()
    with pytest.raises(MachineError, match="m: cannot be written: No such file"), atomic_folder(tmp_path / "m") as part:
        part.rmdir()


def test_a_folder_in_place_of_a_file_is_seen_before_the_work(tmp_path):
    (tmp_path / "f").write_text("x")
    for enter in (lambda: atomic_file(tmp_path).__enter__(), lambda: check_writable(tmp_path)):
        with pytest.raises(MachineError, match="cannot be written: Is a directory"):
            enter()
    for enter in (lambda: atomic_folder(tmp_path / "f").__enter__(), lambda: check_writable(tmp_path / "f", True)):
        with pytest.raises(MachineError, match="f: cannot be written: Not a directory"):
            enter()
    with pytest.raises(MachineError, match="x: cannot be written: Not a directory"):
        check_writable(tmp_path / "f" / "x")
    with pytest.raises(MachineError, match="cannot be written: File name too long"):
        check_writable(tmp_path / ("n" * 300))
    check_writable(tmp_path / "new" / "deep" / "x.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead, alive = (tmp_path / f".{pid}.partial.x" for pid in (gone.pid, os.getppid()))
    dead.touch()
    alive.touch()
    with atomic_file(tmp_path / "x") as temporary:
        temporary.write_text("new")
    assert not dead.exists()
    assert alive.exists()
    assert (tmp_path / "x").read_text() == "new"


def test_errors_of_the_machine_while_reading(tmp_path):
    with pytest.raises(MachineError, match="x: cannot be read: Input/output error"):
        raise_if_machine("x", OSError(errno.EIO, "Input/output error"))
    for number in (errno.ENOENT, errno.EISDIR):  # the path that the user gave is wrong
        raise_if_machine("x", OSError(number, os.strerror(number)))
    raise_if_machine("x", ValueError("no number"))


def test_the_error_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(MachineError("x: cannot be written: why", errno.EIO, "x")))
    assert (str(error), error.errno, error.filename) == ("x: cannot be written: why", errno.EIO, "x")
    assert isinstance(error, PyqembError)
    assert files.check_writable


def test_the_root_of_the_file_system_is_no_output():
    with pytest.raises(ConfigError, match="/: is the root of the file system; expected the path of a folder"):
        check_writable("/", folder=True)


@pytest.mark.parametrize("there", [True, False])
def test_the_target_of_a_link_is_written(tmp_path, there):
    store = tmp_path / "store"
    store.mkdir()
    if there:
        (store / "x").write_text("old")
        (store / "m").mkdir()
        (store / "m" / "old").touch()
    for name in ("x", "m"):
        (tmp_path / name).symlink_to(store / name)
    for _ in range(2):
        check_writable(tmp_path / "x")
        with atomic_file(tmp_path / "x") as temporary:
            temporary.write_text("new")
        check_writable(tmp_path / "m", folder=True)
        with atomic_folder(tmp_path / "m") as temporary:
            (temporary / "new").touch()
    assert (tmp_path / "x").is_symlink()
    assert (store / "x").read_text() == "new"
    assert (tmp_path / "m").is_symlink()
    assert [path.name for path in (store / "m").iterdir()] == ["new"]
    assert len(list(tmp_path.iterdir())) == 3
    assert len(list(store.iterdir())) == 2
    files.remove_folder(tmp_path / "m")
    assert not (tmp_path / "m").is_symlink()
    assert (store / "m" / "new").exists()


def test_no_output_replaces_a_device_a_pipe_or_a_link_to_itself(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for enter in (check_writable, lambda path: atomic_file(path).__enter__()):
        for path in ("/dev/null", tmp_path / "pipe"):
            with pytest.raises(ConfigError, match=f"{path}: is a device or a pipe; expected the path of a file"):
                enter(path)
        with pytest.raises(MachineError, match="loop: cannot be written: Too many levels of symbolic links"):
            enter(tmp_path / "loop")
    assert (tmp_path / "pipe").is_fifo()
    assert os.path.exists("/dev/null")


def test_a_check_removes_the_trial_files_of_killed_processes(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (tmp_path / f".{process.pid}.partial.run").touch()
    check_writable(tmp_path / "run" / "deeper", folder=True)
    assert len(list(tmp_path.iterdir())) == 1  # that of another path
    check_writable(tmp_path / "run", folder=True)
    assert not list(tmp_path.iterdir())
