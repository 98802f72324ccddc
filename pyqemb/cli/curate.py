"""`pyqemb curate FILE.toml`: filter, de-duplicate and decontaminate training pairs, with a report."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyqemb.cli.logs import add_quiet, only_warnings

if TYPE_CHECKING:
    from pyqemb.curation.ledger import Ledger


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=Path, help="a .toml, .yaml or .json file with input, out and the [[step]] tables in order"
    )
    parser.add_argument("--input", nargs="+", help="examples to read instead of those in the file")
    parser.add_argument("--out", type=Path, help="output folder, instead of the one in the file")
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from pyqemb.curation.config import CurateConfig
    from pyqemb.curation.pipeline import curate

    given = {"input": args.input, "out": args.out}
    config = CurateConfig.from_file(args.config, {key: value for key, value in given.items() if value is not None})
    if args.quiet:
        only_warnings()
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True,
        disable=args.quiet or not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("reading", total=None)

        def show(ledgers: "Sequence[Ledger]") -> None:
            bar.update(task, description=", ".join(f"{x.name} {x.kept:,}/{x.counts.total():,}" for x in ledgers))

        result = curate(config, on_progress=show)
    for ledger in result.ledgers:
        print(f"{ledger.name}: kept {ledger.kept} of {ledger.counts.total()}")
        for reason, count in ledger.dropped.most_common():
            print(f"  {count} {reason}")
    print(
        f"kept {result.kept} of {result.seen}, written to {result.folder}/kept.jsonl; read {result.folder}/report.html"
    )
    return 0


def kept(args: argparse.Namespace) -> str:
    return "nothing of the results was changed; answers of a relabel step are kept in the output folder"
