"""Tasks: processes, on any machines, that share the parts of one job. Task i of N makes the parts i, i + N, ..."""

import os
from typing import NamedTuple

from pyqemb.data.files import Member
from pyqemb.errors import ConfigError


class Task(NamedTuple):
    """Number `number`, from 0, of `tasks` tasks."""

    number: int
    tasks: int

    def has(self, part: int) -> bool:
        """Whether the part of this number, from 0, belongs to this task."""
        return part % self.tasks == self.number

    def member(self) -> Member:
        """The lock of this task in the folder of the job: two with one number, or of another count, are refused."""
        return Member(f"tasks-{self.tasks}", f"task-{self.number}")

    def __str__(self) -> str:
        return f"task {self.number} of {self.tasks}"


def task_of(tasks: int | None, task: int | None) -> Task | None:
    """The task, None if neither argument is given. ConfigError: only one is given, or there is no such task."""
    if tasks is None and task is None:
        return None
    if tasks is None or task is None:
        raise ConfigError("tasks and task belong together: give both, or none of them")
    if not 0 <= task < tasks:
        raise ConfigError(f"task must lie in 0..{tasks - 1} for {tasks} tasks, got {task}")
    return Task(task, tasks)


def task_from_options(tasks: str | None, task: int | None) -> Task | None:
    """The task of the options --tasks and --task; `--tasks auto` reads the environment, see `task_from_environment`."""
    if tasks == "auto":
        if task is not None:
            raise ConfigError("--task: --tasks auto reads the number of the task from the environment")
        return task_from_environment()
    if (tasks is None) != (task is None):
        raise ConfigError("--tasks and --task belong together: give both, --tasks auto, or none of them")
    if tasks is None or task is None:
        return None
    if not (tasks.isascii() and tasks.isdigit() and int(tasks) >= 1):
        raise ConfigError(f"--tasks: expected the number of tasks, at least 1, or auto, got {tasks!r}")
    if not 0 <= task < int(tasks):
        raise ConfigError(f"--task: expected 0 to {int(tasks) - 1} with --tasks {int(tasks)}, got {task}")
    return Task(task, int(tasks))


def task_from_environment() -> Task:
    """The task of a Slurm array, or without one the rank of RANK and WORLD_SIZE. ConfigError if neither is set."""
    if (task := slurm_task()) is not None:
        return task
    if not {"RANK", "WORLD_SIZE"} <= set(os.environ):
        raise ConfigError(
            "--tasks auto: found neither SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT nor RANK and WORLD_SIZE"
        )
    rank, size = _integer("RANK"), _integer("WORLD_SIZE")
    if not 0 <= rank < size:
        raise ConfigError(f"RANK: expected 0 to WORLD_SIZE - 1, got RANK={rank} and WORLD_SIZE={size}")
    return Task(rank, size)


def slurm_task() -> Task | None:
    """The place of this task in its Slurm array, None outside of an array.

    The ids of the array may start anywhere and have a step. ConfigError for a list with gaps, such as 1,5,7.
    """
    if "SLURM_ARRAY_TASK_COUNT" not in os.environ:
        return None
    count, own = _integer("SLURM_ARRAY_TASK_COUNT"), _integer("SLURM_ARRAY_TASK_ID")
    first, step = _integer("SLURM_ARRAY_TASK_MIN", 0), _integer("SLURM_ARRAY_TASK_STEP", 1)
    last = _integer("SLURM_ARRAY_TASK_MAX", first + (count - 1) * step)
    if step < 1 or last != first + (count - 1) * step or own not in range(first, last + 1, step):
        raise ConfigError(
            f"SLURM_ARRAY_TASK_ID={own}: the array of {count} tasks from {first} to {last} has gaps; "
            "give --tasks and --task"
        )
    return Task((own - first) // step, count)


def _integer(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not (text.isascii() and text.isdigit()):
        kind = "the numbers of a Slurm array" if name.startswith("SLURM") else "a number"
        raise ConfigError(f"{name}: expected {kind}, got {text!r}")
    return int(text)
