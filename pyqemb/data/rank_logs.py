"""Logging of several ranks: rank 0 logs everything, the other ranks only messages about themselves."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

RANK_LOG = logging.getLogger("pyqemb.rank")  # messages that may differ between ranks: every rank logs its own


class _RankFilter(logging.Filter):
    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == RANK_LOG.name:
            record.msg = f"rank {self.rank}: {record.msg}"
            return True
        return self.rank == 0


@contextmanager
def rank_logs(rank: int, size: int) -> Iterator[None]:
    """Context in which ranks other than rank 0 drop the messages of pyqemb that are not logged to RANK_LOG.

    Messages of RANK_LOG name their rank. A single process logs everything without changes.
    """
    loggers = logging.getLogger("pyqemb"), RANK_LOG
    if size == 1 or any(isinstance(each, _RankFilter) for each in RANK_LOG.filters):
        yield
        return
    each = _RankFilter(rank)
    for logger in loggers:
        logger.addFilter(each)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(each)
