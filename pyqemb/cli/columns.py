"""The option --column, for the verbs that read examples."""

import argparse


def add_columns(parser: argparse._ActionsContainer) -> None:
    """Add the option --column; `pyqemb.data.columns.parse_columns` reads its values."""
    parser.add_argument(
        "--column", action="append", default=[], metavar="NAME=COLUMN",
        help="a column of the examples that is read as query, positive, ...; or ignore=COLUMN; may be repeated",
    )  # fmt: skip
