"""What the one JSON reader refuses, by name and place, and what is written."""

import json

import pytest

from pyqemb.data.strict_json import dumps, parse
from pyqemb.errors import DataError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "'a' occurs twice"),
        ('{"x": {"a": 1, "a": 1}}', "'a' occurs twice"),
        ('{"a": 1e999}', "too large"),
        ('{"a": -1e+999}', "too large"),
        ('{"a": ' + "9" * 400 + "}", "too large"),
        ('{"a": ' + "9" * 5000 + "}", "too large"),
        ('{"a": ' + "9" * 250 + "e60}", "too large"),
        ('{"a": NaN}', "NaN is not a number"),
        ("[" * 101 + "]" * 101, "nested deeper than 100"),
        ("[" * 100_000, "nested deeper than 100"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"a": }', "not JSON: Expecting value (column 7)"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ("", "not JSON"),
    ],
)
def test_refused(text, message):
    with pytest.raises(DataError) as caught:
        parse(text, "data.jsonl:7")
    assert str(caught.value).startswith("data.jsonl:7: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1, "b": [1.5, 2e3]}', {"a": 1, "b": [1.5, 2000.0]}),
        (b"\xef\xbb\xbf[1]", [1]),
        ("[" * 100 + "]" * 100, None),
        ('["' + "[" * 500 + '"]', ["[" * 500]),
        ('["\\"' + "{" * 500 + '"]', ['"' + "{" * 500]),
        ('"\\ud83d\\ude00"', "\N{GRINNING FACE}"),
        ("1e308", 1e308),
        ("12345678901234567890", 12345678901234567890),
        ('["e999"]', ["e999"]),
    ],
)
def test_accepted(text, value):
    found = parse(text, "x")
    assert value is None or found == value


def test_half_of_a_surrogate_pair_is_written_as_an_escape():
    text = dumps({"name": "a\udcff", "caf\u00e9": "\U0001f600"})
    assert text == '{"name": "a\\udcff", "caf\u00e9": "\U0001f600"}'
    assert json.loads(text.encode("utf-8")) == {"name": "a\udcff", "caf\u00e9": "\U0001f600"}
