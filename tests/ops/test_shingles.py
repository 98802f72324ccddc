"""Word n-grams and MinHash against their definition in plain Python."""

import random
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqemb import _C, ops

MASK = (1 << 64) - 1
BASE = 0x9E3779B97F4A7C15
TEXTS = [
    "", " .,;!?", "one", "One two, three-four five; six_7 SEVEN", "a b", "Ünïcode straße ÉCOLE 42",
    "今日は良い天気です。とても",
    "mixed 東京 text and 北京 again", "tabs\tand\nlines  ", "emoji 🎉 and … dots — dashes",
    "\uff46\uff55\uff4c\uff4c\u3000\uff57\uff49\uff44\uff54\uff48 \uff11\uff12", "สวัสดีชาวโลก", "привет МИР",
    "x" * 5000, "the same words " * 200,
]  # fmt: skip


def words(text):
    """By Python's own idea of letters and digits; the scripts without spaces in these texts."""
    text = unicodedata.normalize("NFKC", text).lower()
    return re.findall(
        r"[\u3005-\u3007\u3040-\u30ff\u4e00-\u9fff\u0e00-\u0eff]|[^\W\u3005-\u3007\u3040-\u30ff\u4e00-\u9fff\u0e00-\u0eff]+",
        text,
    )


def mixed(x):
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


def mixed32(x):
    x = ((x ^ x >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ x >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ x >> 16


def hash_of(word):
    value = 0xCBF29CE484222325
    for byte in word.encode():
        value = ((value ^ byte) * 0x100000001B3) & MASK
    return value


def slow_shingles(text, n):
    found = [hash_of(word) for word in words(text)]
    n = min(n, len(found))
    grams = [found[i : i + n] for i in range(len(found) - n + 1)] if found else []
    return [mixed(sum(h * pow(BASE, len(g) - 1 - i, MASK + 1) for i, h in enumerate(g)) & MASK) for g in grams]


@pytest.fixture(params=_C.available_isas())
def isa(request):
    before = _C.current_isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_shingles_equal_the_definition(isa, n):
    hashes, counts = ops.shingles(TEXTS, n)
    truth = [slow_shingles(text, n) for text in TEXTS]
    assert counts.tolist() == [len(each) for each in truth]
    assert hashes.tolist() == [value for each in truth for value in each]


def test_min_hash_equals_the_definition(isa):
    signatures = ops.min_hash(TEXTS, num_hashes=21, n=2)
    for text, signature in zip(TEXTS, signatures.tolist(), strict=True):
        values = [(h ^ h >> 32) & 0xFFFFFFFF for h in slow_shingles(text, 2)]
        truth = [min((mixed32(v ^ mixed32(i + 1)) for v in values), default=0xFFFFFFFF) for i in range(21)]
        assert signature == truth, text


def test_equal_places_estimate_the_similarity():
    generator, vocabulary = random.Random(0), [f"w{i}" for i in range(10_000)]
    for overlap in (0, 100, 250, 500):
        pool = generator.sample(vocabulary, 1000 - overlap)
        first, second = pool[:500], pool[500 - overlap :]
        a, b = ops.min_hash([" ".join(first), " ".join(second)], num_hashes=4096, n=1)
        assert abs((a == b).mean() - overlap / (1000 - overlap)) < 4 * 0.5 / 64


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=40), max_size=5), st.integers(1, 4))
def test_any_text(texts, n):
    hashes, counts = ops.shingles(texts, n)
    assert len(hashes) == counts.sum()
    assert len(counts) == len(texts)
    alone = [ops.shingles([text], n)[0] for text in texts]
    assert np.array_equal(hashes, np.concatenate([np.empty(0, np.uint64), *alone]))
    assert np.array_equal(
        ops.min_hash(texts, 7, n), ops.min_hash([text.upper().lower() for text in texts], 7, n)
    ) or any(text.upper().lower() != text.lower() for text in texts)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.shingles("one text"), TypeError, r"\[shingles\] texts must be a list of texts"),
        (lambda: ops.min_hash([1]), TypeError, r"\[min_hash\] texts must be a list of texts"),
        (lambda: ops.shingles(["a"], 0), ValueError, "n must be at least 1, got 0"),
        (lambda: ops.min_hash(["a"], 0), ValueError, "num_hashes must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
