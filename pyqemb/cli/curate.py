"""`pyqemb curate FILE.toml`: filter, de-duplicate and decontaminate training pairs, with a report."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyqemb.cli.logs import add_quiet, only_warnings

if TYPE_CHECKING:
    from pyqemb.curation.ledger import Ledger


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="TOML: input, out, and [[step]] tables in their order")
    parser.add_argument("--input", nargs="+", help="examples, in place of those of the file")
    parser.add_argument("--out", type=Path, help="folder, in place of the file's")
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
