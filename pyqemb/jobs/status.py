"""How far a job in parts is: a file of each process that works at it, and their sum, `pyqemb status`.

OUT.parts/status-task-1-of-3.json, status-alone.json    sealed; written at the start, at the end, and now and then

The number of finished parts is that of the files on disk, whoever made them. The files of the processes only add what
cannot be seen on disk: the rate, errors, and how many parts there will be.
"""

import platform
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pyqemb.data.arguments import Count, NotNegative, check_fields
from pyqemb.data.files import atomic_file, holder_of
from pyqemb.data.machine import unreadable
from pyqemb.data.sealed import seal, unseal
from pyqemb.errors import ConfigError, DataError, one_line
from pyqemb.jobs.folder import parts_folder
from pyqemb.jobs.tasks import Task
from pyqemb.jobs.text import clock_text

_FORMAT = 1
_SECONDS = 15.0  # between two writes
_PATTERN = re.compile(r"[\w*.\[\]-]{0,80}", re.ASCII)

State = Literal["running", "done", "failed", "stopped"]


@dataclass(frozen=True)
class WorkerStatus:
    """What one process has said about itself.

    Attributes:
        kind: the verb of the job, e.g. "encode".
        stage: what it is doing, e.g. "search".
        files: the pattern of the files that complete the parts of this stage.
        total: the number of parts of this stage, of all processes together; None if it is not known.
        is_estimate: whether `total` is an estimate.
        made: the number of parts that this process has made in this stage.
        task: the number of its task, None if it works alone.
        tasks: the number of tasks, None if it works alone.
        state: "running", "done" (its own parts), "failed" or "stopped" (by a signal).
        error: why it failed.
        host: the name of its machine.
        started: when the stage began, in seconds since 1970.
        updated: when this was written.
    """

    kind: str
    stage: str
    files: str
    total: NotNegative | None = None
    is_estimate: bool = False
    made: NotNegative = 0
    task: NotNegative | None = None
    tasks: Count | None = None
    state: State = "running"
    error: str | None = None
    host: str = ""
    started: float = 0.0
    updated: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not _PATTERN.fullmatch(self.files):
            raise ConfigError(f"files must be a pattern of names, got {self.files!r}")

    @property
    def name(self) -> str:
        """The worker in words."""
        return "the process" if self.task is None else f"task {self.task} of {self.tasks}"

    @property
    def rate(self) -> float:
        """Parts per second since the stage began."""
        return self.made / max(self.updated - self.started, 1e-3)


@dataclass(frozen=True)
class JobStatus:
    """The state of a job.

    Attributes:
        kind: the verb of the job.
        stage: its newest stage.
        done: the number of parts of this stage that are finished.
        total: the number of parts of this stage; None if it is not known.
        is_estimate: whether `total` is an estimate.
        rate: parts per second of the processes that are running.
        seconds_left: the time until the stage is done at this rate; None if it is not known.
        workers: what the processes have said; the state "lost" is that of a process that was killed.
    """

    kind: str
    stage: str
    done: int
    total: int | None
    is_estimate: bool
    rate: float
    seconds_left: float | None
    workers: list[dict[str, Any]]

    def line(self) -> str:
        """The state in one line."""
        total = "" if self.total is None else f" of {'about ' if self.is_estimate else ''}{self.total:,}"
        stage = "" if self.stage == self.kind else f" ({self.stage})"
        text = f"{self.kind}{stage}: {self.done:,}{total} parts"
        if self.total:
            text += f", {min(100 * self.done // self.total, 100)} %"
        if self.rate:
            text += f", {60 * self.rate:,.1f} parts a minute"
        if self.seconds_left is not None:
            text += f", about {clock_text(self.seconds_left)} left"
        states = [worker["state"] for worker in self.workers]
        counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states))]
        return one_line(f"{text}; {'tasks' if self.workers[0]['tasks'] else 'process'}: {', '.join(counts)}")

    def failures(self) -> list[str]:
        """A line for each process that failed or is lost."""
        found = []
        for worker in self.workers:
            if worker["state"] == "failed":
                found.append(one_line(f"{worker['name']} failed on {worker['host']}: {worker['error']}"))
            elif worker["state"] == "lost":
                found.append(one_line(f"{worker['name']} is lost: it ended on {worker['host']}; run it again"))
        return found


class Reporter:
    """A context in which a process works at a job; it keeps its status file.

    Args:
        folder: the folder of the parts, which exists.
        kind: the verb of the job.
        task: the task of this process, None if it works alone.
    """

    def __init__(self, folder: Path, kind: str, task: Task | None):
        number, tasks = (None, None) if task is None else (task.number, task.tasks)
        self._path = folder / f"status-{'alone' if task is None else f'task-{task.number}-of-{task.tasks}'}.json"
        self._status = WorkerStatus(kind, kind, "", task=number, tasks=tasks, host=platform.node())

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: Any) -> None:
        if error is None:
            self._write(state="done")
            return
        failed = isinstance(error, Exception)
        words = one_line(f"{type(error).__name__}: {error}")[:500]
        with suppress(Exception):  # the first error is the one to report
            self._write(state="failed" if failed else "stopped", error=words if failed else None)

    def stage(self, name: str, files: str, total: int | None, *, is_estimate: bool = False) -> None:
        """Begin a stage; `files` is the pattern of the files that complete its parts."""
        now = time.time()
        self._status = replace(
            self._status, stage=name, files=files, total=total, is_estimate=is_estimate, made=0, started=now
        )
        self._write()

    def advance(self, parts: int = 1) -> None:
        """Count parts that this process has made."""
        self._status = replace(self._status, made=self._status.made + parts)
        if time.time() - self._status.updated > _SECONDS:
            self._write()

    def _write(self, **changes: Any) -> None:
        self._status = replace(self._status, updated=time.time(), **changes)
        with atomic_file(self._path) as temporary:
            temporary.write_bytes(seal({"format": _FORMAT, **asdict(self._status)}))


def read_status(out: str | Path) -> JobStatus:
    """The state of the job that writes `out`.

    Raises:
        DataError: there is no such job, or a status file is damaged.

    Example:
        >>> from pathlib import Path
        >>> from pyqemb.jobs.status import Reporter, read_status
        >>> from pyqemb.jobs.tasks import Task
        >>> Path("x.npy.parts").mkdir()
        >>> with Reporter(Path("x.npy.parts"), "encode", Task(0, 2)) as report:
        ...     report.stage("encode", "[0-9]*.npy", 4)
        >>> read_status("x.npy").line()
        'encode: 0 of 4 parts, 0 %; tasks: 1 done'
    """
    out = Path(out)
    folder = parts_folder(out)
    found = _workers(folder) if folder.is_dir() else []
    if not found:
        finished = f"; {out} exists, so the job may be finished already" if out.exists() else ""
        raise DataError(f"{folder}: holds no job that has begun{finished}")
    newest = max(found, key=lambda each: (each.started, each.updated))
    same = [each for each in found if each.stage == newest.stage]
    total = max((each.total for each in same if each.total is not None), default=None)
    done = sum(fnmatchcase(path.name, newest.files) for path in folder.iterdir())
    states = [_state(folder, each) for each in found]
    rate = sum(each.rate for each, state in zip(found, states, strict=True) if state == "running" and each in same)
    left = (total - done) / rate if rate and total is not None and total >= done else None
    workers = [{**asdict(each), "name": each.name, "state": state} for each, state in zip(found, states, strict=True)]
    is_estimate = any(each.is_estimate for each in same)
    return JobStatus(newest.kind, newest.stage, done, total, is_estimate, rate, left, workers)


def _workers(folder: Path) -> Sequence[WorkerStatus]:
    """The status files, by task."""
    found = []
    for path in folder.glob("status-*.json"):
        try:
            facts = unseal(path.read_bytes(), str(path))
        except FileNotFoundError:  # the job ends at this moment
            continue
        except OSError as error:
            raise unreadable(path, error) from error
        if facts.pop("format", None) != _FORMAT:
            raise DataError(f"{path}: of another version of pyqemb")
        try:
            found.append(WorkerStatus(**facts))
        except (TypeError, ConfigError) as error:
            raise DataError(f"{path}: damaged: {error}") from error
    return sorted(found, key=lambda each: (each.tasks or 0, each.task or 0))


def _state(folder: Path, status: WorkerStatus) -> str:
    """The state of a process; "lost" if it says that it is running and does not hold its lock."""
    if status.state != "running":
        return status.state
    member = None if status.task is None or status.tasks is None else Task(status.task, status.tasks).member()
    return "running" if holder_of(folder, member) else "lost"
