"""Files that each hold some rows of the tensors, as the ranks of a run write them.

The safetensors metadata of a file lists the rows: "slices" is JSON that maps the name of a tensor to its first row in
this file and the shape of the whole tensor. A tensor without an entry is whole.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pyqemb.data.strict_json import parse
from pyqemb.errors import CheckpointError, DataError
from pyqemb.model.checkpoint import open_safetensors, read_tensor
from pyqemb.model.shards import is_sharded, local, own_rows

_SLICES = "slices"


@dataclass(frozen=True)
class Slice:
    """The rows of a tensor that this rank holds: `tensor` starts at the row `first` of a tensor of `shape`."""

    tensor: torch.Tensor
    first: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Slice":
        """The local rows of a sharded tensor, or all rows of another one; they share its memory."""
        return cls(local(tensor.detach()), own_rows(tensor).start, tuple(tensor.shape))

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows."""
        return tuple(self.tensor.shape) == self.shape

    def copied(self) -> "Slice":
        """A copy on the CPU."""
        return replace(self, tensor=self.tensor.to("cpu", copy=True))


def sharded_like(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of this rank as a tensor that is sharded like `x`; the rows themselves if `x` is not sharded."""
    if not is_sharded(x):
        return rows
    from torch.distributed.tensor import DTensor

    shared: Any = x
    return DTensor.from_local(
        rows, shared.device_mesh, shared.placements, run_check=False, shape=x.shape, stride=x.stride()
    )


def slices_metadata(slices: Mapping[str, Slice]) -> dict[str, str]:
    """The safetensors metadata of a file with these slices."""
    partial = {name: {"first": s.first, "shape": s.shape} for name, s in slices.items() if not s.is_whole}
    return {_SLICES: json.dumps(partial)} if partial else {}


def shard_names(kind: str, count: int) -> list[str]:
    """The names of the `count` files that hold the tensors, e.g. model-00001-of-00002.safetensors."""
    if count == 1:
        return [f"{kind}.safetensors"]
    return [f"{kind}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def shard_files(folder: Path, kind: str) -> list[Path]:
    """The files of that kind in a folder."""
    whole = folder / f"{kind}.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob(f"{kind}-*-of-*.safetensors"))


@dataclass(frozen=True)
class _Part:
    """The rows first..end of a tensor, in a file."""

    first: int
    end: int
    path: Path


class ShardedTensors(Mapping[str, torch.Tensor]):
    """The tensors of files that each hold some rows; they are read from the disk on access.

    CheckpointError names the damaged file or the missing rows.
    """

    def __init__(self, files: Sequence[Path]):
        self._files = {path: open_safetensors(path) for path in files}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[_Part]] = {}
        for path, file in self._files.items():
            slices = _read_slices(path, file)
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                own = tuple(file.get_slice(name).get_shape())
                first, shape = slices.get(name, (0, own))
                if self._shapes.setdefault(name, shape) != shape or own[1:] != shape[1:]:
                    raise CheckpointError(f"{path}: {name} has a different shape in the other files")
                rows = own[0] if own else 1
                self._parts.setdefault(name, []).append(_Part(first, first + rows, path))
        for name in self._shapes:
            self._check_rows(name, self._count(name))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.rows(name, slice(0, self._count(name)))

    def __contains__(self, name: object) -> bool:  # a Mapping would read the tensor
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self._shapes[name]

    def rows(self, name: str, rows: slice) -> torch.Tensor:
        """Some rows of a tensor; the others are not read. A number without dimensions has one row."""
        first, end = (rows.start, rows.stop) if rows.start < rows.stop else (0, 0)
        parts = [part for part in self._parts[name] if part.first < end and first < part.end] or self._parts[name][:1]
        found = [self._read(name, part, max(first, part.first), min(end, part.end)) for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _count(self, name: str) -> int:
        shape = self._shapes[name]
        return shape[0] if shape else 1

    def _read(self, name: str, part: _Part, first: int, end: int) -> torch.Tensor:
        whole = (first, end) == (part.first, part.end)
        rows = None if whole else slice(first - part.first, end - part.first)
        return read_tensor(self._files[part.path], part.path, name, rows)

    def _check_rows(self, name: str, count: int) -> None:
        parts = self._parts[name]
        parts.sort(key=lambda part: (part.first, part.end))
        ends = [0, *(part.end for part in parts)]
        if ends[-1] != count or any(part.first != end for part, end in zip(parts, ends, strict=False)):
            found = ", ".join(f"{part.first}..{part.end} in {part.path.name}" for part in parts)
            raise CheckpointError(f"{parts[0].path.parent}: {name} has {count} rows, found {found}")


def _read_slices(path: Path, file: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
    """(first row, shape of the whole) by name."""
    text = (file.metadata() or {}).get(_SLICES)
    try:
        slices = {} if text is None else parse(text.encode(), f"{path}: {_SLICES}")
        return {name: (int(entry["first"]), tuple(entry["shape"])) for name, entry in slices.items()}
    except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its metadata of slices cannot be read: {error}") from error


def shape_of(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...]:
    """The shape of a tensor, without reading it from files."""
    return tensors.shape(name) if isinstance(tensors, ShardedTensors) else tuple(tensors[name].shape)


def rows_of(tensors: Mapping[str, torch.Tensor], name: str, rows: slice) -> torch.Tensor:
    """Some rows of a tensor; the other rows are not read from files."""
    if isinstance(tensors, ShardedTensors):
        return tensors.rows(name, rows)
    return tensors[name][rows] if tensors[name].ndim else tensors[name]
