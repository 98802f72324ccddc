"""Relabelling by a server that knows what is relevant."""

import json
import re

import numpy as np
import pytest

from pyqemb.curation.ledger import Ledger
from pyqemb.curation.relabel import Relabel
from pyqemb.data.example import Example

FIRST = Example("q 0", "d 20", ("good 10", "bad 19", "bad 80"))
SECOND = Example("q 0", "d 20", ("bad 60",))


class Circle:
    def encode_query(self, texts, instruction=None):
        angles = np.radians([float(text.split()[-1]) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    encode_document = encode_query


@pytest.fixture
def server(serve):
    def judge(messages):
        passage = re.search(r"to judge:\n(.+)", messages[-1]["content"])[1]
        return json.dumps({"relevant": passage.startswith("good")})

    return serve(judge)


def run(server, folder, **options):
    ledger = Ledger("relabel", folder)
    step = Relabel(endpoint={"model": "m", "base_url": server.url}, **options)
    return list(step.run([FIRST, SECOND], ledger)), ledger


def test_promote_remove_drop(server, tmp_path):
    cleaned = Example("q 0", "d 20", ("bad 19", "bad 80"))
    kept, ledger = run(server, tmp_path)
    assert kept == [cleaned, Example("q 0", "good 10", ("bad 19", "bad 80")), SECOND]
    assert ledger.notes == {"judged": 4, "relevant": 1, "malformed": 0}
    assert len(server.seen) == 4
    assert run(server, tmp_path, action="remove")[0] == [cleaned, SECOND]
    kept, ledger = run(server, tmp_path, action="drop")
    assert kept == [SECOND]
    assert ledger.dropped == {"a negative is relevant": 1}
    assert len(server.seen) == 4, "the same questions are not asked again"


def test_only_what_scores_like_the_positive_is_suspected(server, tmp_path):
    _, ledger = run(server, tmp_path, model=Circle(), suspect=0.95)
    assert ledger.notes["judged"] == 2


def test_a_malformed_judgement_changes_nothing(server, tmp_path):
    server.reply = lambda messages: "maybe"
    kept, ledger = run(server, tmp_path, attempts=2)
    assert kept == [FIRST, SECOND]
    assert ledger.notes["malformed"] == 8
