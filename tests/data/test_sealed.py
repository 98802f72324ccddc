"""JSON files that carry their own digest."""

import hashlib
import json

import pytest

from pyqemb.data.sealed import seal, unseal
from pyqemb.errors import DataError


def test_the_digest_is_that_of_the_other_keys():
    raw = seal({"b": [1, 2.5], "a": "\u00e4"})
    content = b'{"a":"\\u00e4","b":[1,2.5]}\n'
    assert json.loads(raw) == {"a": "\u00e4", "b": [1, 2.5], "sha256": hashlib.sha256(content).hexdigest()}
    assert raw.endswith(b"}\n")
    assert b": " not in raw  # the canonical form has no spaces
    assert unseal(raw, "x") == {"a": "\u00e4", "b": [1, 2.5]}
    assert seal({"a": "\u00e4", "b": [1, 2.5]}) == raw


@pytest.mark.parametrize(
    "raw",
    [
        seal({"a": 1})[:-1],
        seal({"a": 1}).replace(b"1,", b"2,"),
        seal({"a": 1}).replace(b":", b": ", 1),
        b'{"a":1}\n',
        b"[]\n",
        b'"sha256"\n',
        b"null\n",
    ],
)
def test_another_content_is_refused(raw):
    with pytest.raises(DataError, match=r"^some file: damaged: it does not match its own checksum$"):
        unseal(raw, "some file")


def test_what_is_not_json_is_named():
    with pytest.raises(DataError, match=r"^some file: "):
        unseal(b'{"a":', "some file")
