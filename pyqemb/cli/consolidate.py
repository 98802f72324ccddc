"""`pyqemb consolidate RUN`: the model of a run's newest checkpoint as a portable folder."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="the folder of a run (save.dir)")
    parser.add_argument("--step", type=int, help="the step of the checkpoint (default: the newest that is intact)")
    parser.add_argument("--out", "-o", type=Path, help="the folder to write (default: RUN/final)")


def run(args: argparse.Namespace) -> int:
    from pyqemb.data.files import check_writable
    from pyqemb.training import consolidate

    if args.out is not None:
        check_writable(args.out, folder=True)
    print(f"written to {consolidate(args.run, args.step, args.out)}")
    return 0
