"""Errors of the machine, recognized in the exceptions of all libraries.

They are a full or read-only disk, missing permissions, and input/output errors.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyqemb.errors import DataError, MachineError, PyqembError

# A missing path, or a folder instead of a file, is an error of the user.
_WRONG_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
# safetensors, Arrow and torch report the number in their message, SQLite has its own messages.
_NUMBER = re.compile(r"(?:os error|errno:?) (\d+)", re.IGNORECASE)
_NUMBER_OF_TORCH = re.compile(r"unable to (?:open|mmap|stat) .*\((\d+)\)$")
_WORDS = {
    "disk is full": errno.ENOSPC,
    "disk I/O error": errno.EIO,
    "readonly database": errno.EROFS,
}
_LIBRARIES = ("safetensors", "pyarrow", "sqlite3")
_OUT_OF_MEMORY = ("CUDA out of memory", "not enough memory: you tried to allocate", "can't allocate memory")


def exit_code_of(error: BaseException) -> int:
    """The exit code of a process that ends with this error; docs/how-to/exit-codes.md lists the codes."""
    if isinstance(error, PyqembError):
        return error.exit_code
    return MachineError.exit_code if is_out_of_memory(error) or errno_of(error) is not None else PyqembError.exit_code


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def errno_of(error: BaseException) -> int | None:
    """Return the machine's error number behind an error; None if there is none.

    It is the errno of an OSError, or the number in an error of safetensors, Arrow, torch or SQLite.
    """
    if isinstance(error, OSError) and error.errno is not None:  # Rust's have no errno
        return error.errno
    if isinstance(error, RuntimeError) and (found := _NUMBER_OF_TORCH.match(str(error))):
        return int(found[1])
    if getattr(error, "sqlite_errorname", "").startswith("SQLITE_IOERR"):  # may be worded as damage
        return errno.EIO
    if not isinstance(error, OSError) and not type(error).__module__.startswith(_LIBRARIES):
        return None
    text = str(error)
    if found := _NUMBER.search(text):
        return int(found[1])
    return next((number for words, number in _WORDS.items() if words in text), None)


def reason(error: BaseException) -> str:
    """The error of the machine in one line."""
    number = errno_of(error)
    return os.strerror(number) if number is not None else " ".join(str(error).split())


def unwritable(path: str | Path, error: BaseException) -> MachineError:
    """The error to raise if `path` cannot be written."""
    return MachineError(f"{path}: cannot be written: {reason(error)}", errno_of(error), str(path))


def unreadable(path: str | Path, error: BaseException, kind: type[PyqembError] = DataError) -> PyqembError:
    """Return the error to raise if `path` cannot be read.

    It is a MachineError, or a `kind` if the path or the content is wrong.
    """
    raise_if_machine(path, error)
    return kind(f"{path}: cannot be read: {reason(error)}")


def raise_if_machine(path: str | Path, error: BaseException) -> None:
    """Raise a MachineError if `path` cannot be read because of the machine.

    Returns if the path or the content is wrong.
    """
    number = errno_of(error)
    if number is not None and number not in _WRONG_PATH:
        raise MachineError(f"{path}: cannot be read: {reason(error)}", number, str(path)) from error


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn errors of the machine inside the block into a MachineError that names `path`. Other errors pass."""
    try:
        yield
    except PyqembError:
        raise
    except Exception as error:
        raise_if_machine(path, error)
        raise


@contextmanager
def writing(path: str | Path, temporary: Path | None = None) -> Iterator[None]:
    """Turn errors of the machine inside the block into a MachineError that names `path`.

    Errors about a file elsewhere pass unchanged.

    Args:
        path: the file or folder that is being written.
        temporary: its temporary path until it is complete.
    """
    try:
        yield
    except MachineError as error:  # about a file inside the folder that is being written
        if temporary is None or str(temporary) not in str(error):
            raise
        message = str(error).replace(str(temporary), str(path))
        raise MachineError(message, error.errno, str(path)) from error
    except PyqembError:
        raise
    except Exception as error:
        if errno_of(error) is None:
            raise
        name = getattr(error, "filename", None)
        if isinstance(name, (str, bytes)):
            at_fault = Path(os.fsdecode(name)).absolute()
            own = [Path(p).absolute() for p in (path, temporary) if p is not None]
            if not any(at_fault.is_relative_to(p) or p.is_relative_to(at_fault) for p in own):
                raise
        raise unwritable(path, error) from error
