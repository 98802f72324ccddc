"""What can go wrong in a user's words, each with the exit code that the command line returns."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class PyqembError(Exception):
    """Base of all errors that pyqemb raises on purpose."""

    exit_code = 1


class ConfigError(PyqembError, ValueError):
    """A configuration or argument that cannot be used."""

    exit_code = 2


class DataError(PyqembError, ValueError):
    """A file that cannot be read, or that does not hold what it should."""

    exit_code = 3


class CheckpointError(DataError):
    """A model folder or training checkpoint that is missing something, damaged, or of another shape."""


class Interrupted(PyqembError):  # noqa: N818  a stop on request, after which the run can continue, is no error
    """Training stopped on request, after it saved or before its first step; `--resume auto` continues it."""

    exit_code = 75


class MachineError(PyqembError, OSError):
    """The machine refused: a disk that is full or read-only, a permission, an input/output error, no memory.

    The message names the path and what was being done; `errno` and `filename` are those of the error that caused it.
    """

    exit_code = 74

    def __init__(self, message: str, errno: int | None = None, filename: str | None = None):
        super().__init__(message)
        self.message, self.errno, self.filename = message, errno, filename

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[type["MachineError"], tuple[str, int | None, str | None]]:
        return type(self), (self.message, self.errno, self.filename)


class RankError(PyqembError, RuntimeError):
    """Another rank of a distributed run is missing, stopped or died, or left with an error of its own.

    `exit_code` is 69, or that of the other rank's error: all ranks of a run exit with the same code.
    """

    exit_code = 69

    def __init__(self, message: str, exit_code: int = 69):
        super().__init__(message)
        self.exit_code = exit_code
