"""What the command line shows of the logger."""

import io
import logging
import sys

import pytest

from pyqemb.cli.logs import log_to_stderr

log = logging.getLogger("pyqemb")


@pytest.mark.parametrize(
    ("rank", "shown"), [(None, "an info\na warning\n"), ("0", "an info\na warning\n"), ("1", "a warning\n")]
)
def test_the_first_rank_shows_more(monkeypatch, capsys, rank, shown):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    level = log.level
    with log_to_stderr():
        log.debug("a detail")
        log.info("an info")
        log.warning("a %s", "warning")
    log.info("afterwards")
    assert capsys.readouterr().err == shown
    assert log.level == level
    assert not log.handlers


def test_a_replaced_stream_gets_the_messages(monkeypatch):
    """As of a live display, which takes the place of sys.stderr while it runs."""
    with log_to_stderr():
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        log.info("between the lines")
    assert stream.getvalue() == "between the lines\n"
