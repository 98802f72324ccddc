"""`pyqemb status OUT`: how far a job is, in one line."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="the output of a job of encode, or of tasks that mine")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from pyqemb.jobs.status import read_status

    status = read_status(args.out)
    if args.json:
        print(json.dumps(asdict(status)))
        return 0
    for line in [status.line(), *status.failures()]:
        print(line)
    return 0
