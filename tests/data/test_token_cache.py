"""Tokens on disk are the tokenizer's, and it is asked once for each text."""

import hashlib
import resource
import signal

import numpy as np
import pytest
import torch

from pyqemb.data.blocks import Blocks
from pyqemb.data.keyed import Keys, keys_of
from pyqemb.data.token_cache import TokenCache, TokenFolder
from pyqemb.data.tokenizer import Tokenizer
from pyqemb.errors import MachineError
from pyqemb.testing.tiny import TEXTS, tiny_tokenizer


class Counting(Tokenizer):
    asked: list

    def encode_documents(self, texts):
        self.asked += texts
        return super().encode_documents(texts)


@pytest.fixture
def tokenizer():
    made = Counting(tiny_tokenizer().backend, 16)
    made.asked = []
    return made


def same(a, b):
    return torch.equal(a.input_ids_T, b.input_ids_T) and torch.equal(a.cu_seqlens, b.cu_seqlens)


def test_packs_what_memory_packs_and_asks_once(tokenizer, tmp_path):
    texts = [*TEXTS, "", "a" * 100, TEXTS[0], "é\n☃"]
    folder = TokenFolder(tokenizer, tmp_path)
    truth = TokenCache(tiny_tokenizer().with_max_length(16)).pack(texts)
    assert same(folder.pack(texts), truth)
    asked = len(tokenizer.asked)
    assert asked == len(set(texts))
    assert same(folder.pack(texts[::-1]), TokenCache(tokenizer).pack(texts[::-1]))
    tokenizer.asked.clear()
    later = TokenFolder(tokenizer, tmp_path)
    assert same(later.pack(texts), truth)
    assert not tokenizer.asked
    assert same(later.pack([*texts, "new"]), TokenCache(tiny_tokenizer().with_max_length(16)).pack([*texts, "new"]))
    assert tokenizer.asked == ["new"]
    assert later.pack([]).num_tokens == 0


def test_another_tokenizer_has_a_folder_of_its_own(tokenizer, tmp_path):
    TokenFolder(tokenizer, tmp_path).pack(TEXTS)
    longer = Counting(tiny_tokenizer().backend, 64)
    longer.asked = []
    assert same(TokenFolder(longer, tmp_path).pack(TEXTS), TokenCache(tiny_tokenizer().with_max_length(64)).pack(TEXTS))
    assert longer.asked
    assert len(list(tmp_path.iterdir())) == 2


def test_only_new_texts_are_tokenized(tokenizer, tmp_path):
    for cache in (TokenCache(tokenizer), TokenFolder(tokenizer, str(tmp_path))):
        assert cache.tokenizer is tokenizer
        for texts, asked in ((["b", "a", "b"], ["b", "a"]), (["a"], []), (["c", "a", "c"], ["c"]), (iter("cd"), ["d"])):
            tokenizer.asked.clear()
            cache.warm(texts)
            assert tokenizer.asked == asked
        tokenizer.asked.clear()
        assert same(cache.pack([*"dab"]), TokenCache(tiny_tokenizer().with_max_length(16)).pack([*"dab"]))
        assert tokenizer.asked == []


def test_the_folder_is_that_of_the_tokenizer(tokenizer, tmp_path):
    """Folders of earlier versions must be found."""
    settings = f"tokens-2 Counting 16 {tokenizer.backend.to_str()}"
    name = hashlib.sha256(settings.encode()).hexdigest()[:24]
    folder = TokenFolder(tokenizer, tmp_path)
    assert folder.folder == tmp_path / name
    folder.pack(["a"])
    blocks = Blocks(tmp_path / name, name)
    (ids,) = blocks.values(blocks.rows(keys_of(["a"])), np.int32)
    assert ids.tolist() == tokenizer.encode_documents(["a"])[0]


def test_each_offset_is_that_of_a_token(tokenizer, tmp_path):
    """A torn end of any length is before the next texts."""
    folder = TokenFolder(tokenizer, tmp_path)
    folder.pack(["a"])
    with (folder.folder / "0000.data").open("ab") as out:
        out.write(b"\xff" * 3)
    folder.pack(["bc"])
    assert same(folder.pack(["bc", "a"]), TokenCache(tiny_tokenizer().with_max_length(16)).pack(["bc", "a"]))


def test_a_loss_right_after_writing_is_an_error(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(Blocks, "append", lambda *_, **__: None)
    folder = TokenFolder(tokenizer, tmp_path)
    with pytest.raises(MachineError) as caught:
        folder.pack(["a"])
    assert str(caught.value) == f"{folder.folder}: lost data that was just written to it"


@pytest.mark.parametrize("name", ["0000.data", "0000.index"])
def test_a_torn_end_is_skipped(tokenizer, tmp_path, name):
    folder = TokenFolder(tokenizer, tmp_path)
    folder.pack(TEXTS[:3])
    del folder
    with next(tmp_path.glob(f"*/{name}")).open(
        "ab"
    ) as out:  # a kill while the next text was written: what comes first is there
        out.write(b"\xff" * 5)
    tokenizer.asked.clear()
    truth = TokenCache(tiny_tokenizer().with_max_length(16)).pack(TEXTS)
    assert same(TokenFolder(tokenizer, tmp_path).pack(TEXTS), truth)
    assert not {*tokenizer.asked} & {*TEXTS[:3]}
    tokenizer.asked.clear()
    assert same(TokenFolder(tokenizer, tmp_path).pack(TEXTS), truth)
    assert not tokenizer.asked


def test_a_full_disk(tokenizer, tmp_path):
    folder = TokenFolder(tokenizer, tmp_path)
    folder.pack(TEXTS[:3])
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        with pytest.raises(MachineError, match="the tokens so far are kept"):
            folder.pack([f"text {i}" for i in range(100)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    tokenizer.asked.clear()
    folder.pack(TEXTS[:3])
    assert not tokenizer.asked


def test_keys_are_found_wherever_they_came():
    keys, texts = Keys(), [str(i) for i in range(3000)]
    start = 0
    for size in (1, 1, 5, 700, 2, 900, 1391):
        keys.add(keys_of(texts[start : start + size]))
        start += size
    assert keys.rows(keys_of(texts)).tolist() == list(range(3000))
    assert keys.rows(keys_of(["x", "7", "y"])).tolist() == [-1, 7, -1]
    assert len(keys._runs) < 8
    for number in range(20):  # added again: the last one counts, in whatever run it is
        keys.add(keys_of(["7", f"new {number}"]))
        assert keys.rows(keys_of(["7", "8"])).tolist() == [3000 + 2 * number, 8]
