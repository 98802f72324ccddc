"""Runs a reader on bytes and judges what it does.

    python tests/fuzzing/harness.py 5000               so many inputs of each target
    python tests/fuzzing/harness.py 5000 rows.csv      of some targets
    python tests/fuzzing/harness.py 5000 --from 70000  other seeds

Prints a line for each find, and the executions of each target.
"""

import argparse
import logging
import os
import resource
import signal
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("RUST_BACKTRACE", "0")
sys.path.insert(0, str(Path(__file__).parent))

import mutate
import run_targets  # noqa: F401  (adds targets)
import targets

from pyqemb.errors import PyqembError

SECONDS, MEMORY = 1.0, 256 << 20
_STOP = 10.0  # seconds of CPU time after which an execution is stopped


class HangError(BaseException):
    """Not an Exception, so that no reader catches it."""


def fault(target: targets.Target, data: bytes) -> str | None:
    """What the reader does wrong with these bytes; None if it returns, or raises an error that names the file."""
    peak, start = _peak(), time.process_time()
    found = None
    try:
        with _stopped():
            target.read(data)
    except HangError:
        found = f"is not done after {_STOP:.0f} s"
    except target.allowed:
        pass
    except PyqembError as error:
        if not any(name in str(error) for name in target.names):
            found = f"does not name the file: {type(error).__name__}: {str(error)[:300]!r}"
    except BaseException as error:  # a panic of Rust is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "/pyqemb/" in f.filename][-1:] or [place]
        found = f"{type(error).__name__}: {str(error)[:200]!r} at {Path(ours[0].filename).name}:{ours[0].lineno}"
    spent, grown = time.process_time() - start, _peak() - peak
    if found is None and spent > SECONDS:
        found = f"takes {spent:.1f} s"
    if found is None and grown > MEMORY:
        found = f"takes {grown >> 20} MiB"
    return found


def kind_of(found: str) -> str:
    """The part of a fault that is the same for inputs alike."""
    return "".join(c for c in found.split(":")[0] if not c.isdigit()) + found.rpartition(" at ")[2] * (" at " in found)


def run(target: targets.Target, first: int, count: int, seconds: float | None = None):
    """Yield (number of executions, bytes, fault or None) of seeded inputs, for that many seconds of CPU time."""
    end = None if seconds is None else time.process_time() + seconds
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew
    for number in range(count):
        if end is not None and time.process_time() > end:
            return
        data = mutate.mutate(first + number, target.seeds, target.form)
        yield number + 1, data, fault(target, data)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextmanager
def _stopped():
    def stop(number, frame):
        raise HangError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, _STOP)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("count", type=int)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--save", type=Path, help="a folder for the inputs of finds")
    options = parser.parse_intermixed_args()
    import torch

    torch.set_num_threads(1)
    logging.getLogger("pyqemb").setLevel(logging.CRITICAL)
    finds = 0
    for name in options.names or targets.TARGETS:
        seen: dict[str, int] = {}
        start, done = time.process_time(), 0
        with TemporaryDirectory() as folder:
            target = targets.make(name, Path(folder))
            print(f"{name} starts", file=sys.stderr, flush=True)
            for done, data, found in run(target, options.first, options.count):
                if found is None:
                    continue
                kind = kind_of(found)
                seen[kind] = seen.get(kind, 0) + 1
                if seen[kind] == 1:
                    finds += 1
                    print(f"{name} seed {options.first + done - 1}: {found}", flush=True)
                    if options.save:
                        (options.save / f"{name}-{options.first + done - 1}").write_bytes(data)
        spent = time.process_time() - start
        print(f"{name}: {done} executions, {1e3 * spent / max(done, 1):.2f} ms each, finds {seen}", flush=True)
    sys.exit(bool(finds))


if __name__ == "__main__":
    main()
