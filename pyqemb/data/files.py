"""Files that are either there in full or not at all: written beside the target, synced, then renamed over it."""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; when the block ends well it becomes `path`, else it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last, so that writers which look at it (.gz, .xz) see the right one.
    temporary = path.with_name(f".{os.getpid()}.partial.{path.name}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        fsync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield a new empty folder beside `target`; when the block ends well it becomes `target`, else it is removed.

    An old `target` disappears only after the new folder is complete and on the disk. Leftovers of processes that
    died while they wrote the same target are removed.
    """
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".*.partial.{target.name}"):
        owner = leftover.name.split(".")[1]
        if leftover.is_dir() and owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(leftover)
    temporary = target.with_name(f".{os.getpid()}.partial.{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*"), reverse=True):
            fsync_folder(path) if path.is_dir() else fsync_file(path)
        fsync_folder(temporary)
        _replace_folder(temporary, target)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    fsync_folder(target.parent)


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
