"""The options --tasks, --task and --dry-run, for the verbs whose jobs tasks can share."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyqemb.jobs.tasks import Task


def add_tasks(parser: argparse._ActionsContainer, after: str, job: str) -> None:
    """Add the options; `own_task` reads them.

    Args:
        parser: the parser of the verb.
        after: what to do after the tasks, for the help of --tasks.
        job: the name of the job in the help of --dry-run.
    """
    parser.add_argument(
        "--tasks",
        metavar="N",
        help=f"do the work of one of N tasks that share the job, see --task{after}. "
        "auto: read both from SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT, or RANK and WORLD_SIZE",
    )
    parser.add_argument("--task", type=int, metavar="I", help="the number of this task, from 0")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help=f"encode a sample, print the texts, tokens, time, memory and disk of {job}, then stop; --tasks N needs "
        "no --task",
    )


def own_task(args: argparse.Namespace) -> "Task | None":
    """The task of the options, None without them. ConfigError if they name none."""
    from pyqemb.jobs.tasks import task_from_options

    is_any = args.dry_run and args.task is None and args.tasks not in (None, "auto")
    return task_from_options(args.tasks, 0 if is_any else args.task)
