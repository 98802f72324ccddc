"""`pyqemb evaluate MODEL FOLDER`: a table of metrics with their intervals."""

import argparse
from pathlib import Path
from typing import Any

from pyqemb.cli.columns import add_columns
from pyqemb.cli.logs import add_quiet, progress_shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder, or the name of a model on the hub")
    parser.add_argument(
        "folder", nargs="?",
        help="a folder in BEIR layout or with sts.jsonl or bitext.jsonl, or examples (a file, a saved dataset, hub://ORG/NAME)",
    )  # fmt: skip
    parser.add_argument(
        "--suite", help="instead of a folder: mteb:NAME, where NAME is a benchmark or tasks separated by commas"
    )
    parser.add_argument("--instruction", help="instruction of the queries (default: the model's own)")
    parser.add_argument(
        "--dim", type=_dims, default=(None,), metavar="DIM[,DIM...]",
        help="use the first DIM features (Matryoshka); several: a table",
    )  # fmt: skip
    parser.add_argument(
        "--precision", type=_precisions, default=("float32",), metavar="PRECISION[,PRECISION...]",
        help="precision of the stored vectors: float32 (default), int8, uint8, binary, ubinary; several: a table",
    )  # fmt: skip
    parser.add_argument(
        "--rescore", type=int, metavar="K",
        help="order the best K documents again, by the float32 query and the quantized document; the table has both",
    )  # fmt: skip
    parser.add_argument(
        "--split", help="split of the judgments, qrels/SPLIT.tsv, or of a dataset (default: test, or the only one)"
    )
    add_columns(parser)
    parser.add_argument(
        "--bootstrap", type=int, default=1000, help="resamples of the 95%% bootstrap intervals (default: 1000)"
    )
    parser.add_argument("--json", type=Path, help="also write the whole report to this file")
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from pyqemb.data.columns import parse_columns
    from pyqemb.data.files import check_writable
    from pyqemb.errors import ConfigError
    from pyqemb.evaluation import evaluate
    from pyqemb.evaluation.metrics import shown

    if (args.folder is None) == (args.suite is None):
        raise ConfigError("expected a folder or --suite, one of them")
    if args.json is not None:
        check_writable(args.json)
    if args.suite is not None:
        return _suite(args)
    if len(args.dim) > 1 or len(args.precision) > 1 or args.rescore is not None:
        return _compare(args)
    with progress_shown(args.quiet):
        report = evaluate(
            args.model, args.folder, instruction=args.instruction, dim=args.dim[0], precision=args.precision[0],
            split=args.split, columns=parse_columns(args.column), bootstrap=args.bootstrap,
        )  # fmt: skip
    table = Table(title=f"{report['task']}: {args.folder}, {report['count']} rows")
    for column in ("metric", "value", "95 % interval"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, value in report["metrics"].items():
        table.add_row(name, shown(value["value"]), f"{shown(value['low'])} - {shown(value['high'])}")
    Console().print(table)
    _write_json(args.json, report)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from pyqemb.data.columns import parse_columns
    from pyqemb.evaluation import compare_storage
    from pyqemb.evaluation.metrics import shown

    with progress_shown(args.quiet):
        reports = compare_storage(
            args.model, args.folder, dims=args.dim, precisions=args.precision, rescore=args.rescore,
            instruction=args.instruction, split=args.split, columns=parse_columns(args.column),
            bootstrap=args.bootstrap,
        )  # fmt: skip
    metric = next(iter(reports[0]["metrics"]))
    table = Table(title=f"{reports[0]['task']}: {args.folder}, {reports[0]['count']} rows")
    for column in ("dim", "precision", "bytes", "rescore", metric, "95 % interval"):
        table.add_column(column, justify="left" if column == "precision" else "right")
    for report in reports:
        value = report["metrics"][metric]
        table.add_row(
            str(report["dim"]), report["precision"], str(report["bytes_per_vector"]), str(report["rescore"] or "-"),
            shown(value["value"]), f"{shown(value['low'])} - {shown(value['high'])}",
        )  # fmt: skip
    Console().print(table)
    _write_json(args.json, reports)
    return 0


def _write_json(path: Path | None, report: Any) -> None:
    from pyqemb.data.files import atomic_file
    from pyqemb.data.strict_json import dumps

    if path is not None:
        with atomic_file(path) as temporary:
            temporary.write_text(dumps(report, indent=1) + "\n", encoding="utf-8")


def _dims(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers separated by commas, got {text!r}") from None


def _precisions(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _suite(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from pyqemb.errors import ConfigError
    from pyqemb.evaluation.metrics import shown
    from pyqemb.model.encoder import open_model

    kind, _, name = args.suite.partition(":")
    if kind != "mteb" or not name:
        raise ConfigError(f"--suite: expected mteb:NAME, got {args.suite!r}")
    of_folder = {
        "--instruction": args.instruction, "--dim": args.dim != (None,), "--precision": args.precision != ("float32",),
        "--rescore": args.rescore is not None, "--split": args.split, "--column": args.column,
        "--bootstrap": args.bootstrap != 1000,
    }  # fmt: skip
    if unused := [flag for flag, given in of_folder.items() if given]:
        raise ConfigError(f"{unused[0]}: is for a folder or examples; the tasks of --suite define it themselves")
    from pyqemb.interop.mteb import run_suite

    with progress_shown(args.quiet):
        scores = run_suite(open_model(args.model), name, f"pyqemb/{Path(args.model).name}")
    table = Table("task", "main score", title=args.suite)
    for task, score in scores.items():
        table.add_row(task, shown(score))
    Console().print(table)
    _write_json(args.json, scores)
    return 0
