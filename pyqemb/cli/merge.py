"""`pyqemb merge A B C --out FOLDER`: merge checkpoints and print the angles between them."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pyqemb.cli.logs import add_quiet, progress_shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="+", type=Path, help="two or more model folders of one architecture")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--method", default="slerp", help="slerp, linear or karcher (default: slerp)")
    parser.add_argument(
        "--weights", type=float, nargs="+", help="one weight for each checkpoint (default: equal weights)"
    )
    parser.add_argument("--base", type=Path, help="merge the differences from this checkpoint (task vectors)")
    parser.add_argument(
        "--settings-from", type=Path, metavar="CHECKPOINT",
        help="checkpoint whose prompts, tokenizer and maximum length the merged model gets; without it they must "
        "not differ",
    )  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="print a line for each tensor")
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    from pyqemb.data.files import check_writable
    from pyqemb.merging import merge

    check_writable(args.out, folder=True)
    with progress_shown(args.quiet):
        report = merge(
            args.checkpoints, args.method, args.weights, args.base, out=args.out, settings_from=args.settings_from
        )
    if args.verbose:
        for tensor in report.tensors:
            print(f"{tensor.angle:9.4f} degrees  {'lerp ' if tensor.lerp else '     '} {tensor.name}")
    names = _names(report.checkpoints)
    shares = ", ".join(f"{name} {weight:.3f}" for name, weight in zip(names, report.weights, strict=True))
    print(f"{report.method} of {shares}" + (f", as differences from {report.base}" if report.base else ""))
    print(
        f"{len(report.tensors)} tensors, angles up to {report.max_angle:.3f} degrees, {report.num_lerp} by lerp "
        "(nearly parallel)"
    )
    print(f"written to {args.out}")
    return 0


def _names(checkpoints: Sequence[str]) -> Sequence[str]:
    """The names of the folders, or the paths if two have the same name."""
    names = [Path(checkpoint).name for checkpoint in checkpoints]
    return names if len(set(names)) == len(names) else checkpoints
