"""The end of a command: exit codes, one-line errors, Ctrl-C and SIGTERM, a closed or full standard output."""

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from pyqemb.data.machine import errno_of, exit_code_of, is_out_of_memory, reason
from pyqemb.errors import PyqembError

EXIT_CODES = {
    0: "done",
    1: "an internal error of pyqemb, or a failed self-test of doctor",
    2: "bad arguments or configuration",
    3: "bad data or model folder, or a failed check of export --verify",
    69: "a rank of a distributed run is missing or died",
    74: "an error of the machine: disk full or read-only, permission denied, input/output error, out of memory",
    75: "training was stopped, and nothing is lost; --resume auto continues it",
    130: "stopped by Ctrl-C (SIGINT)",
    141: "standard output was closed by its reader",
    143: "stopped by SIGTERM",
}
_HOME = Path(__file__).parents[1]


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM was received; handled like a KeyboardInterrupt."""


class StopSignals:
    """Context in which SIGINT and SIGTERM raise Stopped in the main thread. `number` is the received signal."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
                if signal.getsignal(number) is default:  # ignored signals stay ignored, as with nohup
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        first, self.number = self.number is None, number
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # tasks that are cancelled
        loop = sys.modules["asyncio"]._get_running_loop() if "asyncio" in sys.modules else None

        def stop() -> None:
            raise Stopped(signal.Signals(number).name)

        if loop is not None and first:  # not in a task, which would store the exception
            loop.call_soon_threadsafe(stop)
        else:
            stop()


class StandardOutput:
    """Replaces sys.stdout in a context. `error` is the exception of the first failed write or flush."""

    def __enter__(self) -> "StandardOutput":
        self.error: OSError | None = None
        self._stream = sys.stdout
        if self._stream is not None:
            sys.stdout = self
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout = self._stream
        if self.error is not None:  # discard buffered output, because the interpreter would report an error at exit
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self._stream.fileno())
            os.close(devnull)

    def write(self, text: str) -> int:
        """Write text; store the first error."""
        return self._try(self._stream.write, text)

    def flush(self) -> None:
        """Flush the stream; store the first error."""
        if self._stream is not None:
            self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, action: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except OSError as error:
            self.error = self.error or error
            raise


def guarded(work: Callable[[], int], name: str, debug: bool, kept: Callable[[], str], stopped_exit: int | None) -> int:
    """The exit code of `work()`. An error becomes one line on standard error, after its traceback with `debug`.

    Args:
        work: runs the command.
        name: the prefix of the line, e.g. "pyqemb mine".
        debug: print the traceback of an error before its line.
        kept: the message about the outputs of a command that was stopped by a signal.
        stopped_exit: the exit code of such a command; None: 128 + the signal's number.
    """
    with StandardOutput() as output, StopSignals() as signals:
        try:
            try:
                return work()
            finally:
                output.flush()
        except BaseException as error:
            if isinstance(error, SystemExit) and output.error is None:
                raise  # raised by argparse
            if isinstance(output.error, BrokenPipeError):
                return 141
            if signals.number is not None or isinstance(error, KeyboardInterrupt):
                number = signals.number or signal.SIGINT
                code = 128 + number if stopped_exit is None else stopped_exit
                line = f"stopped by {signal.Signals(number).name}; {kept()}"
            elif output.error is not None:
                code, line = 74, f"standard output: cannot be written: {reason(output.error)}"
            else:
                code, line = _explain(error)
            with suppress(OSError):
                if debug:
                    traceback.print_exception(error)
                print(f"{name}: {_one_line(line)}", file=sys.stderr)
            return code


def _explain(error: BaseException) -> tuple[int, str]:
    code = exit_code_of(error)
    if isinstance(error, PyqembError):
        return code, str(error)
    if is_out_of_memory(error):
        return code, f"out of memory: {error}".removesuffix(": ")
    if errno_of(error) is not None:
        path = getattr(error, "filename", None)
        return code, f"{os.fsdecode(path)}: {reason(error)}" if isinstance(path, (str, bytes)) else reason(error)
    return code, f"internal error: {type(error).__name__}: {error}{_place(error)}; --debug shows the traceback"


def _place(error: BaseException) -> str:
    """The innermost line of pyqemb in the traceback of the error."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(_HOME)
    ]
    return f" ({Path(frames[-1].filename).relative_to(_HOME.parent)}:{frames[-1].lineno})" if frames else ""


def _one_line(text: str) -> str:
    """Remove line ends and control characters, because the text may come from a file or a server."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
