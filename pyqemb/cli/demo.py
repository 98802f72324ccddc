"""`pyqemb demo`: run the whole recipe; writes a table, a report and a model for search."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from pyqemb.demo.material import Material
    from pyqemb.demo.results import Results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="output folder (default: runs/demo)")
    parser.add_argument(
        "--ask", metavar="QUESTION", help="search with the model of a finished demo instead of training one"
    )
    parser.add_argument(
        "--data",
        choices=["help", "python"],
        default="help",
        help="the data that ship with pyqemb, or code search over the installed Python (default: help)",
    )
    parser.add_argument("--train", type=Path, help="your own training pairs; needs --eval")
    parser.add_argument("--eval", type=Path, help="your own BEIR folder; needs --train")
    parser.add_argument(
        "--quick", action="store_true", help="run every step in one to three minutes; the model learns little"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")


def run(args: argparse.Namespace) -> int:
    from pyqemb.errors import ConfigError

    if args.ask is not None:
        return _ask(args.out, args.ask)
    if (args.train is None) != (args.eval is None):
        raise ConfigError("--train and --eval go together")
    from dataclasses import replace

    from rich.console import Console

    from pyqemb.demo.pipeline import REPORT, Settings, run_demo
    from pyqemb.demo.report import how_to

    settings = replace(Settings(), seed=args.seed)
    console = Console()
    results = run_demo(
        _material(args),
        args.out,
        settings.quick() if args.quick else settings,
        lambda text: console.print(text, markup=False, highlight=False),
    )
    _print_table(results, console)
    total = sum(step.seconds for step in results.steps)
    print(f"\n{total / 60:.1f} minutes, peak memory {max(step.memory for step in results.steps):.2f} GiB")
    print(f"report: {args.out / REPORT}\nmodel:  {how_to(results)}")
    return 0


def _material(args: argparse.Namespace) -> "Material":
    if args.train is not None:
        from pyqemb.demo.own_data import own_material

        return own_material(args.train, args.eval, seed=args.seed, limit=2000 if args.quick else None)
    if args.data == "python":
        from pyqemb.demo.python_data import python_material

        return python_material(seed=args.seed, files=20) if args.quick else python_material(seed=args.seed)
    from pyqemb.demo.help_data import help_material

    return help_material(seed=args.seed, pages=120 if args.quick else None)


def _print_table(results: "Results", console: "Console") -> None:
    from rich.table import Table

    from pyqemb.demo.results import METRICS

    for metric in METRICS:
        for corpus in results.corpora:
            table = Table(title=f"{metric}, {corpus}")
            columns = results.columns()
            for column in ("", *columns):
                table.add_column(column, justify="right" if column else "left")
            for row in results.rows:
                cells = [row.scores[corpus].get(column, {}).get(metric) for column in columns]
                mean = columns.index("mean")
                table.add_row(
                    row.name, *(str(c) if i == mean else f"{c.value:.3f}" if c else "" for i, c in enumerate(cells))
                )
            console.print(table)


def _ask(out: Path, question: str) -> int:
    from pyqemb.demo.ask import ask

    for answer in ask(out, question):
        print(f"{answer.score:.3f}  {answer.source}\n       {answer.text}")
    return 0
