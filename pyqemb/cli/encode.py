"""`pyqemb encode MODEL FILE --out FILE`: the vectors of a file of texts."""

import argparse
from pathlib import Path
from typing import Any

from pyqemb.cli.logs import add_quiet, only_warnings
from pyqemb.cli.tasks import add_tasks, own_task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder, or the name of a model on the hub")
    parser.add_argument(
        "texts", type=Path, help=".jsonl, .csv, .tsv or .parquet with a column of texts, or .txt with lines"
    )
    parser.add_argument("--out", "-o", type=Path, required=True, help=".npy, .safetensors or .parquet")
    parser.add_argument(
        "--side", choices=["document", "query", "raw"], default="document", help="the prompt to use (default: document)"
    )
    parser.add_argument(
        "--instruction", help="instruction of the query prompt, instead of the model's own; implies --side query"
    )
    parser.add_argument("--field", default="text", help="the column that holds the texts (default: text)")
    parser.add_argument("--dim", type=int, help="keep the first DIM features (Matryoshka)")
    parser.add_argument(
        "--precision",
        choices=["float32", "int8", "uint8", "binary", "ubinary"],
        default="float32",
        help="format of the vectors (default: float32)",
    )
    parser.add_argument("--max-length", type=int, help="longest text in tokens (default: the model's own)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="precision of the model")
    parser.add_argument(
        "--device", action="append", help="device; repeat it for one process each, e.g. --device cuda:0 --device cuda:1"
    )
    parser.add_argument("--processes", type=int, help="number of processes on the CPU")
    parser.add_argument(
        "--rows-per-part",
        type=int,
        default=8192,
        help="rows of a part; a killed job repeats at most one part (default: 8192)",
    )
    add_tasks(parser, "; pyqemb finish OUT then joins the parts", "the job")
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from pyqemb.encoding import encode_file, plan_encode
    from pyqemb.errors import ConfigError

    own = own_task(args)
    if args.device and args.processes:
        raise ConfigError("--device and --processes exclude each other")
    if args.processes is not None and args.processes < 1:
        raise ConfigError(f"--processes must be at least 1, got {args.processes}")
    devices = args.device or (["cpu"] * args.processes if args.processes else ["auto"])
    settings: dict[str, Any] = dict(
        side="query" if args.instruction else args.side, instruction=args.instruction, field=args.field, dim=args.dim,
        precision=args.precision, max_length=args.max_length, dtype=args.dtype, devices=devices,
        rows_per_part=args.rows_per_part,
    )  # fmt: skip
    if args.dry_run:
        for line in plan_encode(args.model, args.texts, args.out, tasks=own.tasks if own else 1, **settings).lines():
            print(line)
        return 0
    # Progress in bytes of the file, because its rows are not counted beforehand (an estimate for compressed columns).
    total = args.texts.stat().st_size // (own.tasks if own else 1) if args.texts.is_file() else None
    columns = (
        BarColumn(),
        TextColumn("{task.fields[rows]:,} texts, {task.fields[rate]:,.0f}/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    if args.quiet:
        only_warnings()
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, disable=args.quiet or not console.is_terminal)
    task = bar.add_task("", total=total, rows=0, rate=0.0)

    def show(rows: int, size: int) -> None:
        bar.start()  # not before the arguments have been checked
        bar.update(task, completed=size, rows=rows, rate=rows / (bar.tasks[0].elapsed or 1e-9))

    try:
        done = encode_file(
            args.model, args.texts, args.out, tasks=own and own.tasks, task=own and own.number, on_progress=show,
            **settings,
        )  # fmt: skip
    finally:
        bar.stop()
    resumed = f" ({done.resumed} of them from an earlier run)" if done.resumed else ""
    if own:
        print(f"{own}: {done.rows} texts{resumed}; when all tasks are done, run pyqemb finish {args.out}")
        return 0
    print(f"{done.rows} texts{resumed}, vectors of {done.dim} features, written to {done.out}")
    return 0


def kept(args: argparse.Namespace) -> str:
    return f"finished parts are in {args.out}.parts; the same command continues from there"
