"""Damage to any byte of a cache is found and mended; several processes write at once; a kill costs what was being
written.
"""

import errno
import hashlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from pyqemb.data import blocks as module
from pyqemb.data.blocks import Blocks
from pyqemb.data.keyed import keys_of
from pyqemb.data.token_cache import TokenCache, TokenFolder
from pyqemb.errors import MachineError
from pyqemb.model.cached_encoder import CachedEncoder
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def bytes_of(*values):
    """Keys, the concatenated values and their lengths, as `append` takes them."""
    raw = b"".join(values)
    return np.frombuffer(raw, np.uint8), np.array([len(value) for value in values], dtype=np.int64)


def add(cache, texts, values, align=1):
    cache.append(keys_of(texts), *bytes_of(*values), align=align)


def read(cache, texts):
    rows = cache.rows(keys_of(texts))
    assert rows.dtype == np.int64
    found = iter(cache.values(rows[rows >= 0], np.uint8))
    return [None if row < 0 else next(found).tobytes() for row in rows]


def record(identity, texts, values, offset, lengths=None):
    """What an index holds of a block: the format of the folder. `lengths`: others than those of the values."""
    content = b"".join(values)
    head = struct.pack("<8sIQQI", b"\x93qblock1", len(texts), offset, len(content), zlib.crc32(content))
    head += keys_of(texts).tobytes() + struct.pack(f"<{len(values)}i", *(lengths or map(len, values)))
    key = hashlib.blake2b(identity.encode(), digest_size=32).digest()
    return head + hashlib.blake2b(head, digest_size=16, key=key).digest()


def test_the_format(tmp_path):
    """Folders of earlier versions must stay readable."""
    cache = Blocks(tmp_path / "a" / "b", "name")
    assert (len(cache), cache.width) == (0, None)
    assert cache.folder == tmp_path / "a" / "b"
    add(cache, "ab", [b"12345", b"678"])
    add(cache, "c", [b"9abc"], align=4)
    assert (len(cache), cache.width) == (3, 5)
    folder = tmp_path / "a" / "b"
    assert sorted(path.name for path in folder.iterdir()) == ["0000.data", "0000.index"]
    assert (folder / "0000.data").read_bytes() == b"12345678" + b"9abc"
    first, second = record("name", "ab", [b"12345", b"678"], 0), record("name", "c", [b"9abc"], 8)
    assert (folder / "0000.index").read_bytes() == first + second
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}
    again = Blocks(folder, "name")
    assert read(again, "cab?") == [b"9abc", b"12345", b"678", None]
    assert read(Blocks(folder, "other"), "abc") == [None] * 3


@pytest.mark.parametrize(("lengths", "offset"), [((9, -1), 0), ((5, 4), 0), ((5, 3), 2**63 - 8)])
def test_a_record_that_contradicts_itself_is_ignored(tmp_path, lengths, offset):
    """Its digest is right: only a faulty program writes it."""
    (tmp_path / "0000.data").write_bytes(b"12345678")
    whole, wrong = (record("x", "ab", [b"12345", b"678"], *rest) for rest in ((0,), (offset, lengths)))
    (tmp_path / "0000.index").write_bytes(wrong)
    assert len(Blocks(tmp_path, "x")) == 0
    (tmp_path / "0000.index").write_bytes(wrong + whole)
    assert read(Blocks(tmp_path, "x"), "ab") == [b"12345", b"678"]


@pytest.mark.parametrize(("before", "offset"), [(0, 0), (1, 12), (12, 12), (13, 24)])
def test_values_are_aligned(tmp_path, before, offset):
    cache = Blocks(tmp_path, "x")
    add(cache, "a", [bytes(before)])
    add(cache, "bc", [b"b" * 12, b"c" * 12], align=12)
    assert (tmp_path / "0000.data").read_bytes() == bytes(offset) + b"b" * 12 + b"c" * 12
    if before == 12:
        assert cache.matrix(cache.rows(keys_of("cab"))).tobytes() == b"c" * 12 + bytes(12) + b"b" * 12
    else:
        assert read(cache, "cab") == [b"c" * 12, bytes(before), b"b" * 12]


def test_many_values_are_written_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MOST", 3)
    monkeypatch.setattr(module, "_CHUNK", 5)  # bytes of a read
    texts = [str(number) for number in range(8)]
    values = [bytes([number]) * (number % 4) for number in range(8)]
    cache = Blocks(tmp_path, "x")
    add(cache, texts, values)
    parts = (slice(0, 3), slice(3, 6), slice(6, 8))
    expected, offset = b"", 0
    for part in parts:
        expected += record("x", texts[part], values[part], offset)
        offset += len(b"".join(values[part]))
    assert (tmp_path / "0000.index").read_bytes() == expected
    assert (tmp_path / "0000.data").read_bytes() == b"".join(values)
    for reader in (cache, Blocks(tmp_path, "x")):
        assert read(reader, texts[::-1]) == values[::-1]


def test_writers_of_one_folder_have_files_of_their_own(tmp_path):
    one, other = Blocks(tmp_path, "x"), Blocks(tmp_path, "x")
    add(one, "ab", [b"1111", b"2222"], align=4)
    add(other, "cd", [b"3333", b"4444"], align=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.data", "0000.index", "0001.data", "0001.index"]
    assert read(one, "dcba") == [b"4444", b"3333", b"2222", b"1111"]  # one has to look again for those of the other
    add(one, "e", [b"5555"], align=4)
    rows = other.rows(keys_of("eacbd"))
    assert (rows >= 0).all()
    matrix = other.matrix(rows)
    assert (matrix.dtype, matrix.shape) == (np.uint8, (5, 4))
    assert matrix.tobytes() == b"5555" + b"1111" + b"3333" + b"2222" + b"4444"
    del one, other
    add(Blocks(tmp_path, "x"), "f", [b"6666"], align=4)  # takes the first pair, whose owner is gone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.data", "0000.index", "0001.data", "0001.index"]


def test_a_matrix_in_order_is_mapped(tmp_path):
    cache = Blocks(tmp_path, "x")
    add(cache, "abc", [b"11", b"22", b"33"], align=2)
    add(cache, "de", [b"44", b"55"], align=2)
    for texts, mapped in (("bcd", True), ("abcde", True), ("e", True), ("acb", False), ("aa", False), ("ba", False)):
        matrix = cache.matrix(cache.rows(keys_of(list(texts))))
        assert matrix.tobytes().decode() == "".join(str("abcde".index(text) + 1) * 2 for text in texts)
        assert isinstance(matrix, np.memmap) == mapped or not mapped
        assert np.shares_memory(matrix, cache._files["0000.index"]._map) == mapped
    cache.matrix(cache.rows(keys_of("a")))[:] = 0  # copied on write
    assert (tmp_path / "0000.data").read_bytes() == b"1122334455"
    with (tmp_path / "0000.data").open("ab") as out:  # a torn end
        out.write(b"6")
    assert cache.matrix(cache.rows(keys_of("b"))).tobytes() == b"22"
    cache = Blocks(tmp_path, "x")
    assert cache.matrix(cache.rows(keys_of("ea"))).tobytes() == b"5511"


def test_values_of_a_dtype(tmp_path):
    cache = Blocks(tmp_path, "x")
    numbers = np.arange(7, dtype=np.int32)
    cache.append(keys_of("abc"), numbers.reshape(1, 7), np.array([8, 0, 20]), align=4)
    rows = cache.rows(keys_of("cba"))
    found = cache.values(rows, np.int32)
    assert [x.tolist() for x in found] == [[2, 3, 4, 5, 6], [], [0, 1]]
    assert {x.dtype for x in found} == {np.dtype(np.int32)}
    with (tmp_path / "0000.data").open("ab") as out:  # a torn end
        out.write(b"xyz")
    again = Blocks(tmp_path, "x")
    assert [x.tolist() for x in again.values(again.rows(keys_of("cba")), np.int32)] == [[2, 3, 4, 5, 6], [], [0, 1]]
    assert cache.values(rows[:0], np.int32) == []


def test_the_last_value_of_a_key_counts(tmp_path):
    cache = Blocks(tmp_path, "x")
    for value in (b"old", b"new", b"newest"):
        add(cache, "a", [value])
    assert read(cache, "a") == [b"newest"]
    assert read(Blocks(tmp_path, "x"), "a") == [b"newest"]


def test_a_record_that_is_still_being_written(tmp_path):
    """It is read when it is complete; the bytes before it are not read again."""
    one, two = record("x", "a", [b"12"], 0), record("x", "b", [b"345"], 2)
    (tmp_path / "0000.data").write_bytes(b"12345")
    index = tmp_path / "0000.index"
    for cut in (0, 3, 20, 40, len(two) - 1):
        index.write_bytes(one + two[:cut])
        cache = Blocks(tmp_path, "x")
        assert read(cache, "ab") == [b"12", None]
        assert (len(cache), cache._files["0000.index"].read) == (1, len(one))
        index.write_bytes(one + two)
        assert read(cache, "ab") == [b"12", b"345"]
        assert (len(cache), cache._files["0000.index"].read) == (2, len(one + two))
        assert (cache.refresh(), len(cache)) == (None, 2)


@pytest.mark.parametrize("noise", [b"", b"?", b"\x93qblock1", b"\x93qblock1" * 9, b"\x93\x93qblock"])
def test_noise_between_records(tmp_path, noise):
    one, two = record("x", "a", [b"12"], 0), record("x", "b", [b"345"], 2)
    (tmp_path / "0000.data").write_bytes(b"12345")
    (tmp_path / "0000.index").write_bytes(noise + one + noise + two + noise)
    cache = Blocks(tmp_path, "x")
    assert read(cache, "ba") == [b"345", b"12"]
    assert cache._files["0000.index"].read == len(noise + one + noise + two)
    add(cache, "c", [b"6"])
    assert read(cache, "abc") == [b"12", b"345", b"6"]


def test_one_damaged_block_costs_no_other(tmp_path, caplog):
    cache = Blocks(tmp_path, "x")
    add(cache, "ab", [b"12", b"34"])
    add(cache, "cd", [b"56", b"78"])
    add(cache, "e", [b"9"])
    with (tmp_path / "0000.data").open("r+b") as file:
        file.seek(6)
        file.write(b"?")
    assert read(cache, "abcde") == [b"12", b"34", None, None, b"9"]
    assert cache.rows(keys_of("?bcd")).tolist() == [-1, 1, -1, -1]
    assert read(cache, "dcba") == [None, None, b"34", b"12"]
    words = f"{tmp_path / '0000.data'}: damaged at byte 4; lost values are recomputed"
    assert [entry.getMessage() for entry in caplog.records] == [words]  # once
    add(cache, "cd", [b"56", b"78"])
    assert read(cache, "abcde") == [b"12", b"34", b"56", b"78", b"9"]


def test_a_missing_or_short_data_file_loses_its_values(tmp_path):
    add(Blocks(tmp_path, "x"), "ab", [b"12", b"34"])
    for size in (3, 0, None):
        (tmp_path / "0000.data").unlink() if size is None else os.truncate(tmp_path / "0000.data", size)
        cache = Blocks(tmp_path, "x")
        assert read(cache, "ab") == [None, None]
        assert len(cache) == 2


def test_a_map_grows_with_the_file(tmp_path):
    cache = Blocks(tmp_path, "x")
    add(cache, "a", [b"12"])
    assert read(cache, "a") == [b"12"]
    before = cache._files["0000.index"]._map
    assert read(cache, "a") == [b"12"]
    assert cache._files["0000.index"]._map is before
    add(cache, "b", [b"34"])
    assert read(cache, "ba") == [b"34", b"12"]
    os.truncate(tmp_path / "0000.data", 4)  # the size that is needed
    assert read(cache, "ba") == [b"34", b"12"]


def test_a_write_that_takes_only_a_part_is_continued(tmp_path, monkeypatch):
    real, synced = os.pwrite, []
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: real(handle, data[:3], offset))
    monkeypatch.setattr(
        os, "fdatasync", lambda handle: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
    )
    cache = Blocks(tmp_path, "x")
    add(cache, "ab", [b"12345", b"678"])
    assert read(Blocks(tmp_path, "x"), "ab") == [b"12345", b"678"]
    assert synced == ["0000.data", "0000.index"]  # a record must not survive without its values


def test_a_short_read_ends(tmp_path, monkeypatch):
    """A file that is cut while it is read gives what was there."""
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    handle = os.open(path, os.O_RDONLY)
    monkeypatch.setattr(module, "_CHUNK", 2)
    assert list(module._pieces(handle, 1, 9)) == [b"23", b"45"]
    assert list(module._pieces(handle, 0, 3)) == [b"12", b"3"]
    assert list(module._pieces(handle, 3, 3)) == []
    os.close(handle)


def test_new_names_are_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(module, "fsync_folder", lambda folder: synced.append((folder, sorted(os.listdir(folder)))))
    add(Blocks(tmp_path / "x" / "y", "x"), "a", [b"1"])
    assert synced == [(tmp_path / "x" / "y", ["0000.data", "0000.index"])]


def test_files_are_closed_and_not_inherited(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    cache = Blocks(tmp_path, "x")
    add(cache, "a", [b"1"])
    assert read(cache, "a") == [b"1"]
    handles = [handle for files in (*cache._files.values(), cache._writer) for handle in (files.index, files.data)]
    assert len(handles) == 4
    assert not any(os.get_inheritable(handle) for handle in handles)
    del cache
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(FileNotFoundError):
        module._Files(tmp_path / "absent.index", os.O_RDONLY)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize("name", ["open", "pread"])
def test_errors_of_the_machine_are_named(tmp_path, monkeypatch, number, name):
    add(Blocks(tmp_path, "x"), "a", [b"1"])

    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(MachineError) as caught:
            Blocks(tmp_path, "x")
    assert str(caught.value) == f"{tmp_path}: cannot be read: {os.strerror(number)}"
    assert caught.value.errno == number
    cache = Blocks(tmp_path, "x")
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(MachineError) as caught:
            cache.rows(keys_of("a"))
    assert str(caught.value) == f"{tmp_path / '0000.data'}: cannot be read: {os.strerror(number)}"
    assert read(cache, "a") == [b"1"]  # it was not taken for damage


def test_a_value_that_the_index_cannot_describe(tmp_path):
    cache = Blocks(tmp_path, "x")
    with pytest.raises(ValueError, match=f"^a value has at most {2**31 - 1} bytes, got {2**31}$"):
        cache.append(keys_of("a"), np.zeros(1, np.uint8), np.array([2**31]), align=1)
    assert list(tmp_path.iterdir()) == []
    cache.append(keys_of([]), np.zeros(0, np.uint8), np.array([], dtype=np.int64), align=1)
    assert len(cache) == 0


def test_a_link_to_itself_is_no_damage(tmp_path):
    add(Blocks(tmp_path, "x"), "a", [b"1"])
    (tmp_path / "0000.data").unlink()
    (tmp_path / "0000.data").symlink_to("0000.data")
    with pytest.raises(MachineError, match=r"0000\.data: cannot be read: Too many levels of symbolic links"):
        Blocks(tmp_path, "x").rows(keys_of("a"))


@pytest.mark.parametrize("name", ["open", "pwrite", "fdatasync"])
def test_errors_of_writing_are_named(tmp_path, monkeypatch, name):
    cache = Blocks(tmp_path, "x")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(MachineError) as caught:
            add(cache, "a", [b"1"])
    assert str(caught.value) == f"{tmp_path}: cannot be written: No space left on device"
    assert caught.value.errno == errno.ENOSPC
    add(cache, "a", [b"1"])
    assert read(cache, "a") == [b"1"]


def test_growing():
    growing, truth = module._Growing(np.int32), []
    assert growing.values.dtype == np.int32
    capacities = set()
    for number in range(300):
        more = list(range(number % 4))
        growing.extend(np.array(more, dtype=np.int32))
        truth += more
        assert growing.values.tolist() == truth
        capacities.add(len(growing._data))
    assert max(capacities) <= 2 * len(truth)
    assert len(capacities) < 12  # it doubles
    assert growing.values.dtype == np.int32


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Tokens, Vectors])
def test_processes_share_a_cache(kind, tmp_path):
    jobs = [writer(kind, tmp_path, seed, 15) for seed in range(2)]
    assert [job.wait(120) for job in jobs] == [0, 0]
    kind(tmp_path).check([str(i) for i in range(60)])
    assert len(list(tmp_path.rglob("*.index"))) <= 2


@pytest.mark.slow
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
