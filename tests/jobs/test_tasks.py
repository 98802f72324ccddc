"""The number of a task, from options and from the environment."""

import pytest

from pyqemb.errors import ConfigError
from pyqemb.jobs.tasks import Task, slurm_task, task_from_options, task_of

VARIABLES = [*(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "MAX", "STEP")), "RANK", "WORLD_SIZE"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def slurm(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))


def test_the_parts_of_all_tasks_are_all_parts():
    owners = [[task for task in range(3) if Task(task, 3).has(part)] for part in range(7)]
    assert owners == [[0], [1], [2], [0], [1], [2], [0]]


def test_in_python():
    assert task_of(None, None) is None
    assert task_of(3, 2) == (2, 3)
    for tasks, task, words in (
        (3, None, "belong together"),
        (None, 0, "belong together"),
        (3, 3, "task must lie in 0..2 for 3 tasks, got 3"),
        (3, -1, "got -1"),
    ):
        with pytest.raises(ConfigError, match=words):
            task_of(tasks, task)


def test_options():
    assert task_from_options(None, None) is None
    assert task_from_options("4", 3) == (3, 4)
    for tasks, task, words in (
        ("4", None, "--tasks and --task belong together: give both, --tasks auto, or none of them"),
        (None, 1, "--tasks and --task belong together"),
        ("4", 4, "--task: expected 0 to 3 with --tasks 4, got 4"),
        ("4", -1, "got -1"),
        ("0", 0, "--tasks: expected the number of tasks, at least 1, or auto, got '0'"),
        ("many", 0, "got 'many'"),
        ("\u0664", 0, "--tasks: expected"),
        ("auto", 0, "--task: --tasks auto reads the number"),
        ("auto", None, "found neither SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT nor RANK and WORLD_SIZE"),
    ):
        with pytest.raises(ConfigError, match=words):
            task_from_options(tasks, task)


def test_nothing_is_read_unless_asked_for(environment):
    slurm(environment, ID=1, COUNT=4)
    environment.setenv("RANK", "1")
    environment.setenv("WORLD_SIZE", "2")
    assert task_from_options(None, None) is None
    assert task_from_options("5", 2) == (2, 5)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (dict(ID=2, COUNT=4, MIN=0, MAX=3, STEP=1), (2, 4)),
        (dict(ID=2, COUNT=4), (2, 4)),
        (dict(ID=3, COUNT=4, MIN=1, MAX=4, STEP=1), (2, 4)),
        (dict(ID=14, COUNT=3, MIN=10, MAX=18, STEP=4), (1, 3)),
        (dict(ID=7, COUNT=1, MIN=7, MAX=7, STEP=1), (0, 1)),
    ],
)
def test_a_slurm_array(environment, values, wanted):
    slurm(environment, **values)
    environment.setenv("RANK", "0")  # srun inside of the array
    environment.setenv("WORLD_SIZE", "8")
    assert task_from_options("auto", None) == slurm_task() == wanted


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(ID=5, COUNT=3, MIN=1, MAX=7, STEP=1), "SLURM_ARRAY_TASK_ID=5: the array of 3 tasks from 1 to 7 has gaps"),
        (dict(ID=5, COUNT=3, MIN=0, MAX=4, STEP=2), "has gaps"),
        (dict(ID=3, COUNT=3, MIN=0, MAX=4, STEP=2), "has gaps"),
        (dict(ID=0, COUNT=1, STEP=0), "has gaps"),
        (dict(COUNT=3), "SLURM_ARRAY_TASK_ID: expected the numbers of a Slurm array, got None"),
        (dict(ID="x", COUNT=3), "SLURM_ARRAY_TASK_ID: expected the numbers of a Slurm array, got 'x'"),
        (dict(ID=0, COUNT=""), "SLURM_ARRAY_TASK_COUNT: expected"),
    ],
)
def test_arrays_that_are_refused(environment, values, words):
    slurm(environment, **values)
    with pytest.raises(ConfigError, match=words):
        task_from_options("auto", None)


def test_ranks(environment):
    environment.setenv("RANK", "1")
    with pytest.raises(ConfigError, match="found neither"):
        task_from_options("auto", None)
    environment.setenv("WORLD_SIZE", "2")
    assert task_from_options("auto", None) == (1, 2)
    assert slurm_task() is None
    for rank, words in (("2", "got RANK=2 and WORLD_SIZE=2"), ("-1", "RANK: expected a number, got '-1'")):
        environment.setenv("RANK", rank)
        with pytest.raises(ConfigError, match=words):
            task_from_options("auto", None)
