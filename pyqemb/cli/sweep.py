"""`pyqemb sweep run.toml --over KEY=VALUE,VALUE`: train every combination of the values, and compare the runs."""

import argparse
import json
from pathlib import Path
from typing import Literal

from pyqemb.cli.logs import add_quiet, only_warnings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a .toml, .yaml or .json file, as for pyqemb train")
    parser.add_argument(
        "--over", action="append", required=True, metavar="KEY=V1,V2",
        help="the values of a key, e.g. train.learning_rate=1e-5,2e-5; of several keys, every combination is run",
    )  # fmt: skip
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="override one key in all runs; may be repeated",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="the folder of the sweep (default: save.dir); each run has one in it")
    parser.add_argument("--metric", help="the metric to compare by (default: eval.metric, or the first reported)")
    parser.add_argument(
        "--tasks", type=int, metavar="N", help="number of tasks that share the runs (default: the Slurm array's, or 1)"
    )
    parser.add_argument("--task", type=int, metavar="I", help="the number of this task, from 0")
    shown = parser.add_mutually_exclusive_group()
    add_quiet(shown)
    shown.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> int:
    from pyqemb.api import sweep
    from pyqemb.errors import ConfigError
    from pyqemb.training.parallel.world import rank_and_size
    from pyqemb.training.sweeps import split_values, task_of

    if rank_and_size()[1] > 1:
        raise ConfigError("a sweep runs in one process; start tasks with --tasks and --task, without torchrun")
    over: dict[str, list[str]] = {}
    for option in args.over:
        key, equals, values = option.partition("=")
        if not equals or not values:
            raise ConfigError(f"--over: expected KEY=VALUE,VALUE, got {option!r}")
        if key.strip() in over:
            raise ConfigError(f"--over {key}: is given twice; list all values of a key in one option")
        over[key.strip()] = split_values(values)
    metric = [] if args.metric is None else [f"eval.metric={json.dumps(args.metric)}"]
    tasks, task = task_of(args.tasks, args.task)
    if args.quiet:
        only_warnings()
    progress: Literal["auto", "off"] = "off" if args.quiet or args.json else "auto"
    report = sweep(
        args.config, over, out=args.out, overrides=[*args.overrides, *metric], tasks=tasks, task=task,
        progress=progress,
    )  # fmt: skip
    if args.json:
        print(json.dumps(report.to_dict()))
        return report.exit_code
    print(report.table())
    if report.num_pending:
        print(f"{report.num_pending} of {len(report.runs)} runs are not finished; the same command continues them")
    if report.best is not None:
        print(f"the best is {report.best.name}; its model is in {report.best.folder}/best")
    return report.exit_code


def kept(args: argparse.Namespace) -> str:
    return "finished runs are kept; the same command continues the sweep"
