"""Rows by number out of memory-mapped shards against `datasets`, and token ids from disk against tokenising again."""

import numpy as np
import pytest

from pyqemb.data.batch import PackedBatch
from pyqemb.data.example import Example
from pyqemb.data.shards import read_shards, write_shards
from pyqemb.data.token_cache import TokenFolder
from pyqemb.model.embedder import Embedder

ROWS, DRAWN = 500_000, 10_000


def pairs(words, count):
    """Queries of 8 words with passages of 60."""
    words = words.split()
    for start in np.random.default_rng(0).integers(len(words) - 68, size=count).tolist():
        yield Example(" ".join(words[start : start + 8]), " ".join(words[start + 8 : start + 68]))


def test_rows_by_number(compare, words, tmp_path):
    datasets = pytest.importorskip("datasets")
    write_shards(tmp_path / "shards", pairs(words, ROWS))
    rows = datasets.Dataset.from_generator(
        lambda: ({"query": e.query, "positive": e.positive} for e in pairs(words, ROWS)), cache_dir=str(tmp_path)
    )
    shards = read_shards(tmp_path / "shards")[None]
    drawn = np.random.default_rng(1).integers(ROWS, size=DRAWN).tolist()
    assert all((shards[i].query, shards[i].positive) == tuple(rows[i].values()) for i in drawn[:100])
    compare(
        f"{DRAWN} of {ROWS} rows, by number", lambda: [shards[i] for i in drawn],
        {"datasets": lambda: [rows[i] for i in drawn]},
    )  # fmt: skip


def test_tokens_from_disk(compare, words, folder, tmp_path):
    tokenizer = Embedder.from_pretrained(folder).tokenizer
    texts = list(dict.fromkeys(e.positive for e in pairs(words, DRAWN)))
    cache = TokenFolder(tokenizer, tmp_path)
    cache.warm(texts)

    def tokenise():
        return PackedBatch.pack(tokenizer.encode_documents(texts))

    assert cache.pack(texts).input_ids_T.equal(tokenise().input_ids_T)
    compare(f"tokens of {len(texts)} passages", lambda: cache.pack(texts), {"tokenizers, again": tokenise})
