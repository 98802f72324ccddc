"""Atomic writing of files and folders: under a temporary name beside the target, synced, then renamed."""

import ctypes
import errno
import fcntl
import glob
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from pyqemb.data.machine import reason, unwritable, writing
from pyqemb.errors import ConfigError, MachineError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def fsync_folder(folder: Path) -> None:
    """Sync a folder, so that renames and new names in it survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents, unless it exists; the new names survive a power failure."""
    try:
        folder.mkdir()
    except FileNotFoundError:
        if folder.parent == folder:
            raise
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
    except OSError:
        if not folder.is_dir():
            raise
        return
    with suppress(PermissionError):  # a parent that can be written but not read cannot be synced
        fsync_folder(folder.parent)


def fsync_file(path: Path) -> None:
    """Sync the bytes of a file to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path: str | Path, folder: bool = False) -> None:
    """Raise a MachineError if the file (or folder) `path` cannot be written; called before hours of work.

    Temporary files of killed processes for the same path are removed. Raises a ConfigError for the root folder "/".
    """
    path = _followed(Path(path).absolute())
    if not path.name:
        raise ConfigError(
            f"{path}: is the root of the file system; expected the path of a {'folder' if folder else 'file'}"
        )
    trial = next(parent for parent in path.parents if os.path.lexists(parent)) / _partial(path.name)
    with writing(path, trial):
        _check_kind(path, folder)
        _remove_leftovers(trial.with_name(path.name))
        trial.touch()
        trial.unlink()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it is renamed to `path` at the end, or removed after an error.

    A symbolic link stays, and the file it points to is written. Temporary files of killed processes for the same file
    are removed. Raises a MachineError that names `path` if it cannot be written.
    """
    path = _followed(Path(path))
    temporary = path.with_name(_partial(path.name))
    with writing(path, temporary):
        _check_kind(path, folder=False)
        make_folder(path.parent)
        _remove_leftovers(path)
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors creates files that only their owner can read
            fsync_file(temporary)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()
        fsync_folder(path.parent)


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield a new empty folder beside `target`; it is renamed to `target` at the end, or removed after an error.

    An existing `target` is replaced only after the new folder is complete and synced. A symbolic link stays, and the
    folder it points to is written. Temporary folders of killed processes for the same target are removed. Raises a
    MachineError that names `target` if it cannot be written.
    """
    target = _followed(Path(target).absolute())
    temporary = target.with_name(_partial(target.name))
    with writing(target, temporary):
        _check_kind(target, folder=True)
        make_folder(target.parent)
        _remove_leftovers(target)
        remove(temporary)
        temporary.mkdir()
        try:
            yield temporary
            for path in sorted(temporary.rglob("*"), reverse=True):
                fsync_folder(path) if path.is_dir() else fsync_file(path)
            fsync_folder(temporary)
            _replace_folder(temporary, target)
            fsync_folder(target.parent)  # before the old folder is removed under its new name
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder atomically: it is never partially removed under its name. Of a symbolic link, remove the link.

    Temporary folders of killed processes are removed too. Raises a MachineError that names `path` if it cannot be
    removed.
    """
    doomed = path.with_name(_partial(path.name))
    try:
        _remove_leftovers(path)
        os.rename(path, doomed)
        fsync_folder(path.parent)  # or a power failure might leave parts of it under its name
        remove(doomed)
    except OSError as error:
        raise MachineError(f"{path}: cannot be removed: {reason(error)}", error.errno, str(path)) from error


def remove(path: Path) -> None:
    """Remove a file, a folder with its contents, or a symbolic link (not its target).

    Does nothing if the path does not exist.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Member(NamedTuple):
    """One of several processes that work in a folder at the same time.

    Attributes:
        group: the name of what they have in common, e.g. "tasks-3". Members of two groups exclude each other.
        name: the name of this one in its group, e.g. "task-0". Two members with one name exclude each other.
    """

    group: str
    name: str


@contextmanager
def locked(folder: Path, work: str, member: Member | None = None) -> Iterator[None]:
    """Lock the folder, which is created if it is missing. The lock of a killed process is released.

    Args:
        folder: the folder that only one process, or the members of one group, may write to. Its file .lock names the
            process; each member has its own, .lock.GROUP.NAME. After an error, a folder that was created here and
            holds nothing else is removed.
        work: the name of the work for the error, e.g. "training run".
        member: this process works in the folder together with the others of its group (default: alone).

    Raises:
        ConfigError: another process, which the error names, holds the lock. MachineError: the folder cannot be written.
    """
    is_new = not folder.exists()
    with ExitStack() as held:
        with writing(folder):
            make_folder(folder)
            lock = _hold(held, folder, work, member)
        try:
            yield
        except BaseException:
            was_idle = is_new and all(path.name.startswith(".lock") for path in folder.glob("*"))
            if was_idle and (member is None or _try_lock(lock, fcntl.LOCK_EX)):  # no other member works here
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other member of a folder's group is in such a block."""
    with ExitStack() as held:
        with writing(folder):
            fcntl.flock(_open_lock(held, folder / ".lock.members"), fcntl.LOCK_EX)
        yield


def holder_of(folder: Path, member: Member | None = None) -> str:
    """What the process that has locked a folder, alone or as a member, says about itself; empty if there is none."""
    path = folder / ".lock" if member is None else _lock_of(folder, member)
    return _held_by(path) if path.exists() else ""


def _hold(held: ExitStack, folder: Path, work: str, member: Member | None) -> IO[str]:
    """Lock the folder until `held` is closed; returns its lock. ConfigError if another process holds it."""
    file = lock = _open_lock(held, folder / ".lock")
    if not _try_lock(file, fcntl.LOCK_EX if member is None else fcntl.LOCK_SH):
        holder = _content(file) or next(filter(None, map(_held_by, sorted(folder.glob(".lock.*.*")))), "")
        raise ConfigError(f"{folder}: another {work} is running here: {holder}")
    file.truncate(0)
    process = f"pid {os.getpid()} on {platform.node()}\n"
    if member is not None:
        file, process = _open_lock(held, _lock_of(folder, member)), f"{member.name} of {member.group}, {process}"
        if not _try_lock(file, fcntl.LOCK_EX):
            raise ConfigError(f"{folder}: another {work} is running here: {_content(file)}")
        file.truncate(0)
    # Not buffered: after an error, closing the file would try to write it again.
    os.write(file.fileno(), process.encode())
    if member is not None:  # after its own lock: of two groups that start together, one at least sees the other
        for path in folder.glob(".lock.*.*"):
            if not path.name.startswith(f".lock.{member.group}.") and (other := _held_by(path)):
                raise ConfigError(f"{folder}: another {work} is running here: {other}")
    return lock


def _lock_of(folder: Path, member: Member) -> Path:
    return folder / f".lock.{member.group}.{member.name}"


def _open_lock(held: ExitStack, path: Path) -> IO[str]:
    return held.enter_context(path.open("a+", encoding="utf-8", errors="replace"))


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(file.fileno()).st_nlink > 0  # else it was removed with its folder after it was opened


def _content(file: IO[str]) -> str:
    file.seek(0)
    return " ".join(file.read(200).split())


def _held_by(path: Path) -> str:
    """What the holder of a lock has written about itself; empty if nobody holds it."""
    with ExitStack() as held:
        file = _open_lock(held, path)
        return "" if _try_lock(file, fcntl.LOCK_SH) else _content(file) or path.name


def kind_of_path(path: Path) -> str:
    """The kind of a path that is not a folder, for an error."""
    return "a broken symbolic link" if not path.exists() else "a file"


def _partial(name: str) -> str:
    # The suffix stays last for writers that use it (.gz, .xz).
    return f".{os.getpid()}.partial.{name}"


def _followed(path: Path) -> Path:
    """The path, or the target of a symbolic link."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


def _check_kind(path: Path, folder: bool) -> None:
    """Raise a MachineError for a folder instead of a file, a file instead of a folder, and a link to itself.

    Raises a ConfigError for a device or a pipe.
    """
    if not os.path.lexists(path):
        return
    if path.is_symlink() or path.is_dir() != folder:  # _followed returns a link that points to itself
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
    """Rename `new` to `target`; an existing target gets the name of `new`."""
    if not target.exists():
        os.rename(new, target)
    elif not _exchange(new, target):
        # Without an atomic exchange, the old folder has only another name for a moment.
        aside = target.with_name(f".{os.getpid()}.old.{target.name}")
        os.rename(target, aside)
        os.rename(new, target)
        os.rename(aside, new)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux renameat2); False if it is not supported."""
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
