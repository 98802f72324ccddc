"""`pyqemb finish OUT`: the output of a job whose parts were made by tasks."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="the output that the tasks were given as --out")


def run(args: argparse.Namespace) -> int:
    from pyqemb.api import finish
    from pyqemb.cli.mine import show
    from pyqemb.encoding.job import Encoded

    done = finish(args.out)
    if not isinstance(done, Encoded):
        show(done, None, args.out)
        return 0
    print(f"{done.rows} texts, vectors of {done.dim} features, written to {done.out}")
    return 0


def kept(args: argparse.Namespace) -> str:
    return f"all parts are kept in {args.out}.parts; the same command joins them"
