"""The exceptions of pyqemb, each with the exit code of the command line."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: a similar known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_line(text: str) -> str:
    """The text with its line ends and control characters escaped, which may come from a file or a server."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class PyqembError(Exception):
    """The base class of all errors that pyqemb raises. The message is one line."""

    exit_code = 1

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(PyqembError, ValueError):
    """A configuration or argument is invalid."""

    exit_code = 2


class DataError(PyqembError, ValueError):
    """A file cannot be read, or has invalid content."""

    exit_code = 3


class CheckpointError(DataError):
    """A model folder or training checkpoint is incomplete, damaged, or has unexpected shapes."""


class Interrupted(PyqembError):  # noqa: N818  not an error: the run can continue
    """Training was stopped by a signal, after it saved or before its first step; `--resume auto` continues it."""

    exit_code = 75


class MachineError(PyqembError, OSError):
    """An error of the machine: a full or read-only disk, missing permissions, an input/output error, out of memory.

    The message names the path and the operation; `errno` and `filename` are those of the original error.
    """

    exit_code = 74

    def __init__(self, message: str, errno: int | None = None, filename: str | None = None):
        super().__init__(message)
        self.message, self.errno, self.filename = message, errno, filename

    def __str__(self) -> str:
        return one_line(self.message)

    def __reduce__(self) -> tuple[type["MachineError"], tuple[str, int | None, str | None]]:
        return type(self), (self.message, self.errno, self.filename)


class RankError(PyqembError, RuntimeError):
    """Another rank of a distributed run is missing, stopped, died, or exited with an error.

    `exit_code` is 69, or that of the other rank's error, so that all ranks of a run exit with the same code.
    """

    exit_code = 69

    def __init__(self, message: str, exit_code: int = 69):
        super().__init__(message)
        self.exit_code = exit_code
