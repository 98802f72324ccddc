"""Damage to any byte of a cache is found and mended; several processes write at once; a kill costs what was being
written.
"""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from pyqemb.curation.vectors import CachedEncoder
from pyqemb.data.blocks import Blocks
from pyqemb.data.keyed import keys_of
from pyqemb.data.token_cache import TokenCache, TokenFolder
from pyqemb.errors import MachineError
from pyqemb.testing.tiny import TEXTS, tiny_tokenizer

MORE = ["more", "and more"]


class Lengths:
    """A model whose vectors say what the text is."""

    def __init__(self, fingerprint="lengths"):
        self.fingerprint = fingerprint

    def encode_document(self, texts):
        return np.array([[len(text), hash_of(text), len(self.fingerprint)] for text in texts], np.float32)


def hash_of(text):
    return sum(i * b for i, b in enumerate(text.encode(), start=1)) % 9973


class Tokens:
    """The token cache as something that reads texts and has a truth."""

    def __init__(self, folder, max_length=16):
        self.tokenizer = tiny_tokenizer().with_max_length(max_length)
        self.cache, self.truth = TokenFolder(self.tokenizer, folder), TokenCache(self.tokenizer)

    def check(self, texts):
        found, truth = self.cache.pack(texts), self.truth.pack(texts)
        assert found.input_ids_T.equal(truth.input_ids_T)
        assert found.cu_seqlens.equal(truth.cu_seqlens)


class Vectors:
    def __init__(self, folder, name="lengths"):
        self.model = Lengths(name)
        self.cache = CachedEncoder(self.model, folder)

    def check(self, texts):
        np.testing.assert_array_equal(self.cache.encode_document(texts), self.model.encode_document(texts))


def written(kind, folder, *of):
    """The files of a cache that was written in two blocks."""
    cache = kind(folder, *of)
    cache.check(TEXTS[:2])
    cache.check(TEXTS[:4])
    del cache
    return {path: path.read_bytes() for path in sorted(folder.rglob("0*"))}


def check_twice(kind, folder, *of):
    """Right now and, with what was mended, later: however the reader orders its texts."""
    kind(folder, *of).check([*TEXTS[3::-1], *MORE])
    kind(folder, *of).check([*MORE, *TEXTS[:4]])


@pytest.mark.promise("R19", "each byte of the token and vector caches changed")
@pytest.mark.parametrize("kind", [Tokens, Vectors])
def test_every_byte_counts(kind, tmp_path):
    files = written(kind, tmp_path / "cache")
    assert len(files) == 2
    for path, content in files.items():
        for at in range(len(content)):
            for other, before in files.items():
                other.write_bytes(before)
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
            check_twice(kind, tmp_path / "cache")


@pytest.mark.promise("R19", "the token and vector caches cut at each byte")
@pytest.mark.parametrize("kind", [Tokens, Vectors])
def test_files_that_end_anywhere_or_are_missing(kind, tmp_path):
    files = written(kind, tmp_path / "cache")
    for path, content in files.items():
        for size in [None, *range(len(content))]:
            for other, before in files.items():
                other.write_bytes(before)
            path.unlink() if size is None else path.write_bytes(content[:size])
            check_twice(kind, tmp_path / "cache")


@pytest.mark.parametrize(("kind", "of"), [(Tokens, (16, 7)), (Vectors, ("one", "other"))])
def test_files_of_another_cache_are_not_believed(kind, of, tmp_path):
    files = [list(written(kind, tmp_path / str(name), name).items()) for name in of]
    for which in ([0], [1], [0, 1]):
        for number in (0, 1):
            for place, content in (pair for each in files for pair in each):
                place.write_bytes(content)
            for index in which:
                files[number][index][0].write_bytes(files[1 - number][index][1])
            check_twice(kind, tmp_path / str(of[number]), of[number])


def test_damage_is_told(tmp_path, caplog):
    path = next(path for path in written(Vectors, tmp_path / "cache") if path.suffix == ".data")
    raw = bytearray(path.read_bytes())
    raw[3] ^= 1
    path.write_bytes(raw)
    check_twice(Vectors, tmp_path / "cache")
    assert "0000.data: damaged at byte 0; lost values are recomputed" in caplog.text


def test_a_folder_that_goes_away_takes_nothing(tmp_path):
    cache = Tokens(tmp_path / "cache")
    cache.check(TEXTS[:4])
    shutil.rmtree(tmp_path / "cache")
    written(Tokens, tmp_path / "cache")
    cache.check([*MORE, *TEXTS])
    Tokens(tmp_path / "cache").check([*MORE, *TEXTS])


def test_a_file_that_shrinks_is_named(tmp_path):
    blocks = Blocks(tmp_path / "cache", "x")
    blocks.append(keys_of("ab"), np.arange(6, dtype=np.int32), np.array([8, 16]), align=4)
    rows = blocks.rows(keys_of("ab"))
    assert blocks.values(rows[1:], np.int32)[0].tolist() == [2, 3, 4, 5]
    os.truncate(tmp_path / "cache" / "0000.data", 8)
    with pytest.raises(MachineError, match=r"0000\.data: has shrunk while it was in use"):
        blocks.values(rows, np.int32)


def test_a_cache_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    written(Tokens, tmp_path / "cache")

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pyqemb.data.blocks._claim", refuse)
    Tokens(tmp_path / "cache").check(TEXTS[:4])
    with pytest.raises(MachineError, match="cannot be written: Read-only file system; the tokens so far are kept"):
        Tokens(tmp_path / "cache").check(MORE)


WRITER = """
    import sys, time
    from test_blocks import Tokens, Vectors
    kind, folder, seed, rounds = sys.argv[1:]
    import random
    draw = random.Random(int(seed))
    cache = {"Tokens": Tokens, "Vectors": Vectors}[kind](folder)
    for number in range(int(rounds)):
        cache.check([str(draw.randrange(4 * int(rounds))) for _ in range(20)])
        print(number, flush=True)
"""


def writer(kind, folder, seed, rounds):
    command = [sys.executable, "-c", textwrap.dedent(WRITER), kind.__name__, str(folder), str(seed), str(rounds)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("kind", [Tokens, Vectors])
def test_processes_share_a_cache(kind, tmp_path):
    jobs = [writer(kind, tmp_path, seed, 15) for seed in range(2)]
    assert [job.wait(120) for job in jobs] == [0, 0]
    kind(tmp_path).check([str(i) for i in range(60)])
    assert len(list(tmp_path.rglob("*.index"))) <= 2


@pytest.mark.parametrize("kind", [Tokens, Vectors])
def test_killed_and_stopped_writers(kind, tmp_path):
    """Two that are killed while they write, and one that stands still with its files locked."""
    jobs = [writer(kind, tmp_path, seed, 100_000) for seed in range(3)]
    for job in jobs:
        assert job.stdout.readline()
    time.sleep(0.5)
    for job in jobs:
        job.send_signal(signal.SIGSTOP if job is jobs[0] else signal.SIGKILL)
    start = time.monotonic()
    assert writer(kind, tmp_path, 7, 15).wait(60) == 0
    kind(tmp_path).check([str(i) for i in range(100)])
    assert time.monotonic() - start < 40
    for job in jobs:
        job.kill()
        job.wait()


def test_a_value_too_long_for_the_index_is_refused(tmp_path):
    """Its length in int32 would be 5."""
    cache = Blocks(tmp_path / "cache", "any")
    with pytest.raises(ValueError, match=f"a value has at most 2147483647 bytes, got {2**32 + 5}"):
        cache.append(keys_of(["text"]), np.zeros(5, np.uint8), np.array([2**32 + 5]), 1)
    assert len(Blocks(tmp_path / "cache", "any")) == 0
