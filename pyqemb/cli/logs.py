"""Messages of the logger "pyqemb" on the command line: each is a line on standard error."""

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class StderrHandler(logging.Handler):
    """Writes to the current sys.stderr, which a live display may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message as a line."""
        print(self.format(record), file=sys.stderr)


def add_quiet(parser: argparse._ActionsContainer) -> None:
    """Add the option --quiet."""
    parser.add_argument("--quiet", action="store_true", help="show no progress and only warnings")


def only_warnings() -> None:
    """Drop messages below WARNING until the command ends (`log_to_stderr`)."""
    logging.getLogger("pyqemb").setLevel(logging.WARNING)


@contextmanager
def progress_shown(quiet: bool) -> Iterator[None]:
    """Context with progress bars if standard error is a terminal; with `quiet`, without bars and only with warnings."""
    from pyqemb.model.progress import progress_bars

    if quiet:
        only_warnings()
    with progress_bars(not quiet and sys.stderr.isatty()):
        yield


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Context that shows messages of level INFO and above on standard error."""
    logger, handler = logging.getLogger("pyqemb"), StderrHandler()
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
