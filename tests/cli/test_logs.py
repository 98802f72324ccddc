"""What the command line shows of the logger."""

import io
import logging
import sys

import pytest

from pyqemb.cli.logs import log_to_stderr
from pyqemb.data.rank_logs import RANK_LOG, rank_logs

log = logging.getLogger("pyqemb")


@pytest.mark.parametrize(
    ("rank", "size", "shown"),
    [
        (0, 1, "an info\na warning\n1 chunk\n"),
        (0, 2, "an info\na warning\nrank 0: 1 chunk\n"),
        (1, 2, "rank 1: 1 chunk\n"),
    ],
)
def test_the_first_rank_shows_all_messages_and_the_others_those_about_themselves(capsys, rank, size, shown):
    level = log.level
    with log_to_stderr(), rank_logs(rank, size), rank_logs(rank, size):
        log.debug("a detail")
        log.info("an info")
        log.warning("a %s", "warning")
        RANK_LOG.warning("%d chunk", 1)
    log.info("afterwards")
    assert capsys.readouterr().err == shown
    assert log.level == level
    assert not log.handlers + log.filters + RANK_LOG.filters


def test_a_replaced_stream_gets_the_messages(monkeypatch):
    """As of a live display, which takes the place of sys.stderr while it runs."""
    with log_to_stderr():
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        log.info("between the lines")
    assert stream.getvalue() == "between the lines\n"
