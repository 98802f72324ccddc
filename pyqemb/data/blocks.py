"""An append-only key-value folder for several processes, made of files of checksummed blocks.

FOLDER/0000.data     the values, block after block
FOLDER/0000.index    a record for each block: its place and checksum, the keys and lengths of its values, a digest of
                     the record

A process locks and writes its own pair of files, and reads all pairs. Files are never truncated or rewritten. A block
that is incomplete or damaged is skipped, and its values are added again.
"""

import fcntl
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from pyqemb.data.files import fsync_folder, make_folder
from pyqemb.data.keyed import KEY, Keys
from pyqemb.data.machine import reading, unreadable, unwritable
from pyqemb.data.rank_logs import RANK_LOG
from pyqemb.errors import MachineError

_MAGIC = b"\x93qblock1"
_HEAD = struct.Struct(
    "<8sIQQI"
)  # _MAGIC, number of values, offset and size of their bytes in .data, crc32 of these bytes
_SEAL = 16  # bytes of the digest after a record
_MOST = 8192  # values of a block, all of which are checked at its first read
_CHUNK = 1 << 24
_LONGEST = 2**31 - 1  # bytes of a value: the index holds lengths as int32
_MAX_OFFSET = 2**63 - 1  # of a file


class Blocks:
    """Byte strings by key: `rows` finds them, `append` adds them, `values` and `matrix` read them.

    `identity` identifies what the values depend on; blocks with another identity are ignored. A block's checksum is
    verified when one of its values is looked up for the first time; a damaged block is logged, and its values count as
    missing.

    Raises MachineError: the disk is full, or cannot be read or written. The values in the folder are kept.
    """

    def __init__(self, folder: Path, identity: str):
        self.folder = folder
        self._identity = hashlib.blake2b(identity.encode(), digest_size=32).digest()
        self._keys, self._blocks = Keys(), list[_Block]()
        self._starts, self._lengths, self._block = (_Growing(kind) for kind in (np.int64, np.int32, np.int32))
        self._files: dict[str, _Files] = {}
        self._writer: _Files | None = None
        self.refresh()

    def __len__(self) -> int:
        return self._keys.count

    def refresh(self) -> None:
        """Read the index entries that this and other processes have appended."""
        try:
            for path in sorted(self.folder.glob("*.index")):
                if path.name not in self._files:
                    self._files[path.name] = _Files(path, os.O_RDONLY)
                self._load(self._files[path.name])
        except OSError as error:
            raise unreadable(self.folder, error, MachineError) from error

    def rows(self, keys: np.ndarray) -> np.ndarray:
        """int64 [N]: the row of each key, -1 if it has no intact value."""
        rows = self._keys.rows(keys)
        if (rows < 0).any():
            self.refresh()
            rows = self._keys.rows(keys)
        found = np.flatnonzero(rows >= 0)
        blocks = self._block.values[rows[found]]
        damaged = [number for number in np.unique(blocks).tolist() if not self._is_sound(self._blocks[number])]
        rows[found[np.isin(blocks, damaged)]] = -1
        return rows

    def values(self, rows: np.ndarray, kind: type) -> list[np.ndarray]:
        """The values of rows as arrays of a dtype, mapped from the disk."""
        size = np.dtype(kind).itemsize
        blocks, starts = self._block.values[rows], self._starts.values[rows] // size
        ends = starts + self._lengths.values[rows] // size
        tables: dict[int, np.ndarray] = {}
        for number in np.unique(blocks).tolist():
            table = np.asarray(self._blocks[number].files.mapped(self._blocks[number].end))
            tables[number] = table[: len(table) // size * size].view(kind)
        return [
            tables[block][start:end]
            for block, start, end in zip(blocks.tolist(), starts.tolist(), ends.tolist(), strict=True)
        ]

    @property
    def width(self) -> int | None:
        """The bytes of the first value, None without values."""
        return int(self._lengths.values[0]) if len(self) else None

    def matrix(self, rows: np.ndarray) -> np.ndarray:
        """Return values of equal width as a matrix: uint8 [N, width].

        All values must have that width and be aligned to it. The matrix is memory-mapped if the values are contiguous.
        """
        assert self.width is not None
        numbers, inverse = np.unique(self._block.values[rows], return_inverse=True)
        ends: dict[_Files, int] = {}
        for block in (self._blocks[number] for number in numbers.tolist()):
            ends[block.files] = max(block.end, ends.get(block.files, 0))
        first = self._starts.values[rows] // self.width  # the row in its file
        maps = [files.mapped(end) for files, end in ends.items()]
        tables = [table[: len(table) // self.width * self.width].reshape(-1, self.width) for table in maps]
        if len(tables) == 1:
            run = np.array_equal(first, np.arange(first[0], first[0] + len(first)))
            return tables[0][first[0] : first[0] + len(first)] if run else tables[0][first]
        order = {files: place for place, files in enumerate(ends)}
        table_of = np.array([order[self._blocks[number].files] for number in numbers.tolist()])[inverse]
        result = np.empty((len(rows), self.width), dtype=np.uint8)
        for place, table in enumerate(tables):
            result[table_of == place] = table[first[table_of == place]]
        return result

    def append(self, keys: np.ndarray, data: np.ndarray, lengths: np.ndarray, align: int) -> None:
        """Add values under distinct keys.

        Args:
            keys: [N] of dtype KEY, the keys of the values.
            data: the concatenated bytes of the values.
            lengths: int64 [N], the number of bytes of each value.
            align: the offset of a value in its file is a multiple of this many bytes, if all lengths are.

        Raises:
            ValueError: a value of 2^31 bytes or more.
        """
        if lengths.max(initial=0) > _LONGEST:
            raise ValueError(f"a value has at most {_LONGEST} bytes, got {lengths.max()}")
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        ends = np.cumsum(lengths, dtype=np.int64)
        try:
            if self._writer is None:
                self._writer = _claim(self.folder)
            for start in range(0, len(keys), _MOST):
                some = slice(start, start + _MOST)
                first = int(ends[start - 1]) if start else 0
                self._write(self._writer, keys[some], raw[first : int(ends[some][-1])], lengths[some], align)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        self.refresh()

    def _write(self, files: "_Files", keys: np.ndarray, raw: np.ndarray, lengths: np.ndarray, align: int) -> None:
        data, values = files.open_data(), raw.tobytes()
        offset = -(-os.fstat(data).st_size // align) * align
        _write_all(data, values, offset)
        os.fdatasync(data)
        record = _HEAD.pack(_MAGIC, len(keys), offset, len(values), zlib.crc32(values))
        record += keys.astype(KEY).tobytes() + lengths.astype("<i4").tobytes()
        _write_all(files.index, record + self._seal(record), os.fstat(files.index).st_size)
        os.fdatasync(files.index)

    def _load(self, files: "_Files") -> None:
        """Add the intact records after those that were read.

        An incomplete record at the end is checked again later, because it may still be written.
        """
        raw, at = files.unread(), 0
        read = 0
        while (at := raw.find(_MAGIC, at)) >= 0:
            size = self._add(files, raw, at)
            at += size or 1
            read = at if size else read
        files.read += read

    def _add(self, files: "_Files", raw: bytes, at: int) -> int:
        """Add the block of the record at `at`; returns the size of the record, 0 if it is not intact."""
        if len(raw) < at + _HEAD.size:
            return 0
        _, values, offset, size, crc = _HEAD.unpack_from(raw, at)
        keys = at + _HEAD.size
        lengths = keys + values * KEY.itemsize
        end = lengths + 4 * values
        if raw[end : end + _SEAL] != self._seal(raw[at:end]):
            return 0
        each = np.frombuffer(raw, "<i4", values, lengths).astype(np.int64)
        if (each < 0).any() or each.sum() != size or offset + size > _MAX_OFFSET:
            return 0
        self._keys.add(np.frombuffer(raw, KEY, values, keys))
        self._starts.extend(offset + np.cumsum(each) - each)
        self._lengths.extend(each)
        self._block.extend(np.full(values, len(self._blocks)))
        self._blocks.append(_Block(files, offset, offset + size, crc))
        return end + _SEAL - at

    def _seal(self, record: bytes) -> bytes:
        return hashlib.blake2b(record, digest_size=_SEAL, key=self._identity).digest()

    def _is_sound(self, block: "_Block") -> bool:
        if block.sound is None:
            try:
                block.sound = block.files.crc(block.offset, block.end) == block.crc
            except OSError as error:
                raise unreadable(block.files.path, error, MachineError) from error
            if not block.sound:
                RANK_LOG.warning("%s: damaged at byte %d; lost values are recomputed", block.files.path, block.offset)
        return block.sound


@dataclass
class _Block:
    files: "_Files"
    offset: int
    end: int
    crc: int
    sound: bool | None = None  # None: not checked yet


class _Files:
    """An index and its data, held open.

    A process can continue to use them if the folder is removed or replaced.
    """

    def __init__(self, index: Path, flags: int):
        self.path = index.with_suffix(".data")
        self.index = self.data = -1
        self.index = os.open(index, flags | os.O_CLOEXEC, 0o666)
        self.read = 0  # bytes of the index that have been read
        self._flags = flags | os.O_CLOEXEC
        self._map: np.memmap | None = None

    def open_data(self) -> int:
        if self.data < 0:
            self.data = os.open(self.path, self._flags, 0o666)
        return self.data

    def __del__(self) -> None:
        for handle in (self.index, self.data):
            if handle >= 0:
                os.close(handle)

    def unread(self) -> bytes:
        return b"".join(_pieces(self.index, self.read, os.fstat(self.index).st_size))

    def crc(self, start: int, end: int) -> int | None:
        """The crc32 of these bytes; None if the file is shorter."""
        try:
            if os.fstat(self.open_data()).st_size < end:
                return None
        except FileNotFoundError:
            return None
        crc = 0
        for piece in _pieces(self.data, start, end):
            crc = zlib.crc32(piece, crc)
        return crc

    def mapped(self, end: int) -> np.memmap:
        """uint8: the file up to `end` or beyond, copied on write."""
        if os.fstat(self.data).st_size < end:
            raise MachineError(f"{self.path}: has shrunk while it was in use")
        if self._map is None or len(self._map) < end:
            with reading(self.path), open(self.data, "rb", closefd=False) as file:
                self._map = np.memmap(file, dtype=np.uint8, mode="c")
        return self._map


def _claim(folder: Path) -> _Files:
    """Lock the files that this process writes: the first pair that is not locked, until the process ends."""
    make_folder(folder)
    for number in count():
        files = _Files(folder / f"{number:04}.index", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(files.index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        files.open_data()
        fsync_folder(folder)
        return files
    raise AssertionError


def _pieces(handle: int, start: int, end: int) -> Iterator[bytes]:
    while start < end and (piece := os.pread(handle, min(_CHUNK, end - start), start)):
        yield piece
        start += len(piece)


def _write_all(handle: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(handle, rest, offset)
        rest, offset = rest[written:], offset + written


class _Growing:
    """An array that grows by doubling."""

    def __init__(self, kind: type):
        self._data: np.ndarray = np.empty(0, dtype=kind)
        self._count = 0

    @property
    def values(self) -> np.ndarray:
        return self._data[: self._count]

    def extend(self, more: np.ndarray) -> None:
        if self._count + len(more) > len(self._data):
            self._data = np.concatenate([self.values, np.empty(max(self._count, len(more)), dtype=self._data.dtype)])
        self._data[self._count : self._count + len(more)] = more
        self._count += len(more)
