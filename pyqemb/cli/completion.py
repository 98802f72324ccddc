"""`pyqemb completion SHELL`: print a script with which the shell completes verbs and options."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shell", choices=["bash", "zsh", "tcsh"], help='bash: eval "$(pyqemb completion bash)" in ~/.bashrc'
    )


def run(args: argparse.Namespace) -> int:
    import shtab

    from pyqemb.cli import whole_parser

    print(shtab.complete(whole_parser(), shell=args.shell))
    return 0
