"""Files that are either there in full or not at all: written beside the target, synced, then renamed over it."""

import ctypes
import errno
import fcntl
import glob
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyqemb.data.machine import unwritable, writing
from pyqemb.errors import ConfigError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def fsync_folder(folder: Path) -> None:
    """Make renames and new names inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Push the file's bytes to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path: str | Path, folder: bool = False) -> None:
    """Raise a MachineError now, before hours of work, if the file (or folder) `path` could not be written later.

    For the root folder "/" raise a ConfigError.
    """
    path = _followed(Path(path).absolute())
    if not path.name:
        raise ConfigError(
            f"{path}: is the root of the file system; expected the path of a {'folder' if folder else 'file'}"
        )
    trial = next(parent for parent in path.parents if os.path.lexists(parent)) / _partial(path.name)
    with writing(path, trial):
        _check_kind(path, folder)
        trial.touch()
        trial.unlink()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; when the block ends well it becomes `path`, else it is removed.

    A symbolic link stays, and the file it points to is written. Leftovers of processes that died while they wrote the
    same file are removed. Raises MachineError naming `path` where the machine does not let it be written.
    """
    path = _followed(Path(path))
    temporary = path.with_name(_partial(path.name))
    with writing(path, temporary):
        _check_kind(path, folder=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors makes files that only their owner can read
            fsync_file(temporary)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()
        fsync_folder(path.parent)


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield a new empty folder beside `target`; when the block ends well it becomes `target`, else it is removed.

    An old `target` disappears only after the new folder is complete and on the disk. A symbolic link stays, and the
    folder it points to is written. Leftovers of processes that died while they wrote the same target are removed.
    Raises MachineError naming `target` where the machine does not let it be written.
    """
    target = _followed(Path(target).absolute())
    temporary = target.with_name(_partial(target.name))
    with writing(target, temporary):
        _check_kind(target, folder=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        remove(temporary)
        temporary.mkdir()
        try:
            yield temporary
            for path in sorted(temporary.rglob("*"), reverse=True):
                fsync_folder(path) if path.is_dir() else fsync_file(path)
            fsync_folder(temporary)
            _replace_folder(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        fsync_folder(target.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder at once: it never stands half removed under its name. Of a symbolic link, remove the link.

    What processes that died have left of it is removed too.
    """
    _remove_leftovers(path)
    doomed = path.with_name(_partial(path.name))
    os.rename(path, doomed)
    remove(doomed)


def remove(path: Path) -> None:
    """Remove a file, a folder with its contents, or a symbolic link but not its target.

    Nothing happens if there is none.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, work: str) -> Iterator[None]:
    """Hold the folder, which is made where it is missing. A killed holder lets go by itself.

    Args:
        folder: what no two processes may write to at once. Its file .lock names the holder.
        work: what the holder does there, for the error: "training run".

    Raises:
        ConfigError: names the process that holds the folder already. MachineError: the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+", encoding="utf-8")
    with file:
        with writing(folder):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = os.fstat(file.fileno()).st_nlink == 0  # removed with its folder since it was opened
            except BlockingIOError:
                held = True
            if held:
                file.seek(0)
                raise ConfigError(f"{folder}: another {work} is at work here: {file.read().strip()}")
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {platform.node()}\n")
            file.flush()
        yield


def kind_of_path(path: Path) -> str:
    """What stands where a folder is wanted, for an error."""
    return "a broken symbolic link" if not path.exists() else "a file"


def _partial(name: str) -> str:
    # The suffix stays last, so that writers which look at it (.gz, .xz) see the right one.
    return f".{os.getpid()}.partial.{name}"


def _followed(path: Path) -> Path:
    """The path; of a symbolic link the path that it points to."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


def _check_kind(path: Path, folder: bool) -> None:
    """Raise a MachineError for a folder in place of a file, the reverse, and a link to itself.

    For a device or a pipe raise a ConfigError.
    """
    if not os.path.lexists(path):
        return
    if path.is_symlink() or path.is_dir() != folder:  # _followed leaves a link where it leads to itself
        number = errno.ELOOP if path.is_symlink() else errno.ENOTDIR if folder else errno.EISDIR
        raise unwritable(path, OSError(number, os.strerror(number), str(path)))
    if not folder and not path.is_file():
        raise ConfigError(f"{path}: is a device or a pipe; expected the path of a file")


def _remove_leftovers(path: Path) -> None:
    for leftover in path.parent.glob(f".*.partial.{glob.escape(path.name)}"):
        owner = leftover.name.split(".")[1]
        if owner.isdigit() and not _alive(int(owner)):
            remove(leftover)


def _replace_folder(new: Path, target: Path) -> None:
    """Put `new` where `target` is; an old target ends under the name of `new`."""
    if not target.exists():
        os.rename(new, target)
    elif not _exchange(new, target):
        # No atomic exchange here: for a moment the old folder lives under another name only.
        aside = target.with_name(f".{os.getpid()}.old.{target.name}")
        os.rename(target, aside)
        os.rename(new, target)
        os.rename(aside, new)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux renameat2); False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
