"""The files of a part of a job: their format, and every way in which they can be wrong."""

import hashlib
import json

import numpy as np
import pytest

from pyqemb.data.npy import npy
from pyqemb.data.sealed import seal
from pyqemb.encoding.inputs import Row
from pyqemb.errors import DataError, MachineError
from pyqemb.jobs import parts
from pyqemb.jobs.parts import CandidatesPart, DamagedPartError, VectorPart, texts_digest

VECTORS = np.arange(6, dtype=np.float32).reshape(3, 2)
IDS = ["a", "\u00e4\n", "c d"]


def digest(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "00000007.npy"


def written(path, ids=IDS):
    part = VectorPart(path, "job digest", "texts digest")
    part.write(VECTORS, ids)
    return part


def test_a_part_comes_back(path):
    part = VectorPart(path, "job digest", "texts digest")
    assert not part.started()
    part.write(VECTORS, IDS)
    path.unlink()
    assert part.started()  # by its manifest
    with pytest.raises(DamagedPartError) as caught:
        part.vectors()
    assert str(caught.value) == f"{path}: cannot be read: No such file or directory"
    part.write(VECTORS, IDS)
    part.verify()
    found = part.vectors()
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, VECTORS)
    assert part.ids() == IDS
    path.with_suffix(".json").unlink()
    assert part.started()  # by its vectors


def test_the_format(path):
    """Parts of an earlier version must be read, or their version must be another one."""
    written(path)
    files = {".npy": digest(path.read_bytes()), ".ids": digest(b'"a"\n"\\u00e4\\n"\n"c d"\n')}
    facts = {"format": 1, "job": "job digest", "part": "00000007", "texts": "texts digest", "files": files}
    assert path.with_suffix(".json").read_bytes() == seal(facts)
    assert path.with_suffix(".ids").read_bytes() == b'"a"\n"\\u00e4\\n"\n"c d"\n'
    assert sorted(each.name for each in path.parent.iterdir()) == ["00000007.ids", "00000007.json", "00000007.npy"]


@pytest.mark.parametrize("ids", [None, []])
def test_rows_without_ids(path, ids):
    part = written(path, ids)
    assert part.ids() == []
    assert path.with_suffix(".ids").exists() == (ids is not None)
    part.verify()


@pytest.mark.parametrize("suffix", [".npy", ".ids", ".json"])
def test_each_file_is_checked(path, suffix):
    part = written(path)
    file = path.with_suffix(suffix)
    before = file.read_bytes()
    for content in (before[:-1], before[:-2] + b"??", b""):
        file.write_bytes(content)
        with pytest.raises(DamagedPartError) as caught:
            part.verify()
        words = {".json": f"{file}: "}.get(suffix, f"{file}: damaged: it does not match its checksum")
        assert str(caught.value).startswith(words)
        for read, own in ((part.vectors, ".npy"), (part.ids, ".ids")):
            if suffix in (own, ".json"):
                with pytest.raises(DamagedPartError):
                    read()
            else:
                read()
    file.unlink()
    with pytest.raises(DamagedPartError) as caught:
        part.verify()
    assert str(caught.value) == f"{file}: cannot be read: No such file or directory"


@pytest.mark.parametrize("change", [{"job": "x"}, {"texts": "x"}, {"part": "00000008"}, {"format": 2}, {"more": 1}])
def test_a_part_of_another_job_is_refused(path, change):
    part = written(path)
    facts = {"format": 1, "job": "job digest", "part": "00000007", "texts": "texts digest", "files": {}}
    path.with_suffix(".json").write_bytes(seal({**facts, **change}))
    for call in (part.verify, part.vectors, part.ids):
        with pytest.raises(DamagedPartError) as caught:
            call()
        assert str(caught.value) == f"{path.with_suffix('.json')}: belongs to another part"


def test_texts_that_are_not_known_are_not_compared(path):
    written(path)
    VectorPart(path, "job digest", None).verify()
    for other in (VectorPart(path, "another", None), VectorPart(path.with_name("00000008.npy"), "job digest", None)):
        for suffix in (".npy", ".ids", ".json"):
            other.path.with_suffix(suffix).write_bytes(path.with_suffix(suffix).read_bytes())
        with pytest.raises(DamagedPartError, match="belongs to another part"):
            other.verify()


def test_candidates(path):
    part = CandidatesPart(path, "job", "texts")
    scores, indices = np.float32([[2, 1, -np.inf]]), np.array([[2**40, 3, -1]])
    part.write(scores, indices, np.float32([0.5]))
    part.verify()
    for found, wanted in zip((*part.candidates(), part.positive_scores()), (scores, indices, [0.5]), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert [each.dtype for each in part.candidates()] == [np.float32, np.int64]
    assert path.with_suffix(".indices").read_bytes() == indices.tobytes()


@pytest.mark.parametrize(
    ("suffix", "content", "words"),
    [
        (".indices", b"1234567", "damaged: expected 2 indices"), (".indices", bytes(24), "damaged: expected 2 indices"),
        (".npy", b"x", "expected an .npy file"),
        (".npy", None, "damaged: expected the score of a positive in each row"),
    ],
)  # fmt: skip
def test_candidates_that_are_none(path, suffix, content, words):
    part = CandidatesPart(path, "job", "texts")
    part.write(np.zeros((1, 2), np.float32), np.zeros((1, 2), np.int64), np.zeros(1, np.float32))
    path.with_suffix(suffix).write_bytes(content or b"".join(npy(np.zeros((1, 0), np.float32))))
    files = {each: digest(path.with_suffix(each).read_bytes()) for each in (".npy", ".indices")}
    path.with_suffix(".json").write_bytes(seal({**part._facts(), "files": files}))
    with pytest.raises(DamagedPartError, match=words):
        part.candidates()


@pytest.mark.parametrize("files", [None, [], "x"])
def test_a_manifest_without_files_is_refused(path, files):
    part = written(path)
    facts = {"format": 1, "job": "job digest", "part": "00000007", "texts": "texts digest"}
    path.with_suffix(".json").write_bytes(seal({**facts, **({} if files is None else {"files": files})}))
    with pytest.raises(DamagedPartError, match="belongs to another part"):
        part.verify()


def forge(path, suffix, content):
    """A part whose checksums are right and whose content is wrong."""
    part = written(path)
    path.with_suffix(suffix).write_bytes(content)
    files = {each: digest(path.with_suffix(each).read_bytes()) for each in (".npy", ".ids")}
    path.with_suffix(".json").write_bytes(seal({**part._facts(), "files": files}))
    return part


def test_vectors_that_are_none(path):
    part = forge(path, ".npy", b"x")
    with pytest.raises(DamagedPartError) as caught:
        part.vectors()
    assert str(caught.value) == f"{path}: damaged: expected an .npy file of float32 vectors"
    path.with_suffix(".json").write_bytes(seal({**part._facts(), "files": {}}))
    with pytest.raises(DamagedPartError, match=r"expected an \.npy file"):
        part.vectors()
    with pytest.raises(DamagedPartError) as caught:
        part.verify()
    assert str(caught.value) == f"{path.with_suffix('.json')}: damaged: names no .npy file"


def test_whether_a_part_is_whole(path, caplog):
    assert not VectorPart(path, "job digest", "texts digest").is_whole()
    assert written(path).is_whole()
    assert not caplog.text
    path.unlink()
    assert not VectorPart(path, "job digest", "texts digest").is_whole()
    assert f"{path}: cannot be read: No such file or directory; the part is made again" in caplog.text


def test_the_file_of_the_part_is_written_last(path, monkeypatch):
    order, real = [], parts.atomic_file

    def atomic_file(file):
        order.append(file.name)
        return real(file)

    monkeypatch.setattr(parts, "atomic_file", atomic_file)
    written(path)
    assert order == ["00000007.ids", "00000007.json", "00000007.npy"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b'"a"\n3\n', ": expected a JSON string a line"), (b'"a"\n"b\n', ":2: "), (b"[]\n", ": expected a JSON string")],
)
def test_ids_that_are_none(path, content, words):
    part = forge(path, ".ids", content)
    with pytest.raises(DamagedPartError) as caught:
        part.ids()
    assert str(caught.value).startswith(f"{path.with_suffix('.ids')}{words}")


def test_a_disk_that_fails_is_no_damage(path, monkeypatch):
    part = written(path)

    def fail(self):
        raise OSError(5, "Input/output error", str(self))

    monkeypatch.setattr(type(path), "read_bytes", fail)
    with pytest.raises(MachineError) as caught:
        part.verify()
    assert str(caught.value) == f"{path.with_suffix('.json')}: cannot be read: Input/output error"
    assert issubclass(DamagedPartError, DataError)


def test_the_digest_of_texts():
    rows = [Row("a", "x"), Row(None, "\u00e4")]
    assert texts_digest(rows) == digest(json.dumps([["a", "x"], [None, "\u00e4"]]).encode())
    others = [rows[::-1], rows[:1], [Row("a", "x"), Row("", "\u00e4")], [Row("a", "x "), Row(None, "\u00e4")]]
    assert texts_digest(rows) not in {texts_digest(other) for other in others}
