"""Files of rows of tensors: what a rank writes, and how any number of files is read."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pyqemb.errors import CheckpointError, MachineError
from pyqemb.model.checkpoint import write_safetensors
from pyqemb.model.shard_files import (
    ShardedTensors,
    Slice,
    rows_of,
    shape_of,
    shard_files,
    shard_names,
    sharded_like,
    slices_metadata,
)

WHOLE = torch.arange(21.0).view(7, 3)


def test_a_slice_of_a_plain_tensor():
    x = torch.nn.Parameter(WHOLE.clone())
    own = Slice.of(x)
    assert (own.first, own.shape, own.is_whole) == (0, (7, 3), True)
    assert own.tensor.data_ptr() == x.data_ptr()
    assert not own.tensor.requires_grad
    copy = own.copied()
    assert (copy.first, copy.shape) == (0, (7, 3))
    assert copy.tensor.data_ptr() != x.data_ptr()
    assert copy.tensor.equal(x)
    number = Slice.of(torch.tensor(3.0))
    assert (number.first, number.shape, number.is_whole) == (0, (), True)
    assert not Slice(WHOLE[2:4], 2, (7, 3)).is_whole
    assert sharded_like(x, WHOLE) is WHOLE


def test_metadata_lists_the_slices():
    parts = {"a": Slice(WHOLE[2:4], 2, (7, 3)), "b": Slice(WHOLE, 0, (7, 3))}
    assert slices_metadata(parts) == {"slices": '{"a": {"first": 2, "shape": [7, 3]}}'}
    assert slices_metadata({"b": parts["b"]}) == {}


def test_names(tmp_path):
    assert shard_names("model", 1) == ["model.safetensors"]
    names = [f"optimizer-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert shard_names("optimizer", 3) == names
    for name in reversed(names):
        (tmp_path / name).touch()
    (tmp_path / "model.safetensors").touch()
    assert shard_files(tmp_path, "optimizer") == [tmp_path / name for name in names]
    assert shard_files(tmp_path, "model") == [tmp_path / "model.safetensors"]
    (tmp_path / "optimizer.safetensors").mkdir()
    assert shard_files(tmp_path, "optimizer") == [tmp_path / name for name in names]
    assert shard_files(tmp_path, "other") == []


def write(path, **slices):
    write_safetensors(path, {name: part.tensor for name, part in slices.items()}, slices_metadata(slices))
    return path


@pytest.fixture
def files(tmp_path):
    """Rows 0..3, 3..4 and 4..7 of a tensor, one of them with a whole tensor and a number beside it."""
    return [
        write(tmp_path / "c", w=Slice(WHOLE[4:], 4, (7, 3))),
        write(tmp_path / "a", w=Slice(WHOLE[:3], 0, (7, 3)), n=Slice.of(torch.tensor(5.0)), v=Slice.of(torch.ones(2))),
        write(tmp_path / "b", w=Slice(WHOLE[3:4], 3, (7, 3)), e=Slice.of(torch.zeros(0, 4))),
    ]


def test_any_rows_are_read(files):
    tensors = ShardedTensors(files)
    assert sorted(tensors) == ["e", "n", "v", "w"]
    assert len(tensors) == 4
    assert "w" in tensors
    assert "absent" not in tensors
    assert {name: tensors.shape(name) for name in tensors} == {"e": (0, 4), "n": (), "v": (2,), "w": (7, 3)}
    assert tensors["w"].equal(WHOLE)
    assert tensors["n"].equal(torch.tensor(5.0))
    assert tensors["e"].shape == (0, 4)
    assert tensors["v"].equal(torch.ones(2))
    for first in range(8):
        for end in range(8):
            assert tensors.rows("w", slice(first, end)).equal(WHOLE[first:end]), (first, end)
    with pytest.raises(KeyError):
        _ = tensors["absent"]


def test_only_the_files_of_the_rows_are_read(files, monkeypatch):
    tensors, read = ShardedTensors(files), []
    real = ShardedTensors._read
    monkeypatch.setattr(
        ShardedTensors,
        "_read",
        lambda self, name, part, *rows: (read.append((part.path.name, *rows)), real(self, name, part, *rows))[1],
    )
    tensors.rows("w", slice(2, 4))
    assert read == [("a", 2, 3), ("b", 3, 4)]
    read.clear()
    assert tensors.rows("w", slice(3, 3)).shape == (0, 3)
    assert read == [("a", 0, 0)]


def test_shapes_and_rows_of_plain_tensors(files):
    tensors = ShardedTensors(files)
    plain = {"w": WHOLE, "n": torch.tensor(5.0)}
    for each in (tensors, plain):
        assert shape_of(each, "w") == (7, 3)
        assert shape_of(each, "n") == ()
        assert rows_of(each, "w", slice(2, 5)).equal(WHOLE[2:5])
        assert rows_of(each, "n", slice(0, 1)).equal(torch.tensor(5.0))
    assert isinstance(shape_of(plain, "w"), tuple)


def test_missing_rows_are_named(tmp_path, files):
    def message(*paths):
        with pytest.raises(CheckpointError) as caught:
            ShardedTensors(paths)
        return str(caught.value)

    c, a, b = files
    found = f"{tmp_path}: w has 7 rows, found "
    assert message(a, c) == found + "0..3 in a, 4..7 in c"
    assert message(b, a) == found + "0..3 in a, 3..4 in b"
    assert message(c, b) == found + "3..4 in b, 4..7 in c"
    again = write(tmp_path / "d", w=Slice(WHOLE[3:4], 3, (7, 3)))
    assert message(c, a, b, again) == found + "0..3 in a, 3..4 in b, 3..4 in d, 4..7 in c"
    assert message(write(tmp_path / "e", w=Slice(WHOLE[:1], -1, (7, 3))), *files).startswith(found + "-1..0 in e")
    assert message(write(tmp_path / "f", n=Slice.of(torch.tensor(1.0))), a, b, c) == (
        f"{tmp_path}: n has 1 rows, found 0..1 in f, 0..1 in a"
    )


@pytest.mark.parametrize("shape", [(8, 3), (7, 4), (7,)])
def test_another_shape_is_named(tmp_path, files, shape):
    other = write(tmp_path / "d", w=Slice(WHOLE[:3], 0, shape))
    for paths in ([other], [*files[:1], other]):
        if paths == [other] and shape == (8, 3):
            continue
        with pytest.raises(CheckpointError) as caught:
            ShardedTensors(paths)
        assert str(caught.value) == f"{other}: w has a different shape in the other files"


@pytest.mark.parametrize(
    "slices",
    [
        "{", "[]", "3", "null", '{"w": 3}', '{"w": {}}', '{"w": {"first": 0}}', '{"w": {"shape": [7, 3]}}',
        '{"w": {"first": "x", "shape": [7, 3]}}', '{"w": {"first": null, "shape": [7, 3]}}',
        '{"w": {"first": 0, "shape": 3}}',
    ],
)  # fmt: skip
def test_damaged_metadata_is_named(tmp_path, slices):
    path = tmp_path / "file"
    save_file({"w": WHOLE}, path, metadata={"slices": slices})
    with pytest.raises(CheckpointError) as caught:
        ShardedTensors([path])
    assert str(caught.value).startswith(f"{path}: its metadata of slices cannot be read: ")


def test_metadata_that_is_not_json_names_its_place(tmp_path):
    path = tmp_path / "file"
    save_file({"w": WHOLE}, path, metadata={"slices": "{"})
    with pytest.raises(CheckpointError, match=f"cannot be read: {path}: slices"):
        ShardedTensors([path])


def test_files_without_metadata_are_whole(tmp_path):
    path = tmp_path / "file"
    for metadata in (None, {"format": "pt"}, {"slices": json.dumps({"other": {"first": 1, "shape": [2]}})}):
        save_file({"w": WHOLE}, path, metadata=metadata)
        assert ShardedTensors([path])["w"].equal(WHOLE)


@pytest.mark.parametrize("rows", [slice(0, 7), slice(1, 2)])
@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(5, "Input/output error"), MachineError, "cannot be read: Input/output error"),
        (SafetensorError("bad\n header"), CheckpointError, "w cannot be read: bad header"),
        (ValueError("no such shape\nframe #0"), CheckpointError, "w cannot be read: no such shape"),
    ],
)
def test_errors_of_reading_name_the_file(tmp_path, rows, error, kind, words):
    path = write(tmp_path / "file", w=Slice.of(WHOLE))
    tensors = ShardedTensors([path])

    class Failing:
        def get_tensor(self, name):
            raise error

        get_slice = get_tensor

    tensors._files[path] = Failing()
    with pytest.raises(kind) as caught:
        tensors.rows("w", rows)
    assert str(caught.value) == f"{path}: {words}"
