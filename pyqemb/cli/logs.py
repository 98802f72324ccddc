"""What the command line shows of the logger "pyqemb": each message as a line on standard error."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class StderrHandler(logging.Handler):
    """Writes to sys.stderr as it is when the message comes: a live display may have replaced it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message as a line."""
        print(self.format(record), file=sys.stderr)


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Show messages of the level INFO and above."""
    logger, handler = logging.getLogger("pyqemb"), StderrHandler()
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
