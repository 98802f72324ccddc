"""Writing the parts of a job to one file: .npy, .safetensors or .parquet."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pyqemb.data.files import atomic_file
from pyqemb.data.npy import npy
from pyqemb.errors import ConfigError

_STORED = {"float32": "F32", "int8": "I8", "uint8": "U8"}


class Part(NamedTuple):
    """Vectors of some rows, in order; `ids` is empty if the rows have none."""

    vectors: np.ndarray
    ids: list[str]


def writer_of(path: Path) -> Callable[[Path, Iterable[Part], int, int, np.dtype], None]:
    """The function (path, parts, rows, features, dtype) that writes the file. ConfigError for an unknown suffix."""
    writers = {".npy": _npy, ".safetensors": _safetensors, ".parquet": _parquet}
    if path.suffix not in writers:
        raise ConfigError(f"{path}: expected a name that ends with {', '.join(writers)}")
    return writers[path.suffix]


def ids_path(path: Path) -> Path:
    """The file with the ids of an .npy or .safetensors file, one per line."""
    return path.with_name(path.name + ".ids")


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy file, completely or not at all."""
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        for content in npy(array):
            file.write(content)  # np.save does not report why a write fails


def _npy(path: Path, parts: Iterable[Part], rows: int, features: int, dtype: np.dtype) -> None:
    with path.open("wb") as file:
        np.lib.format.write_array_header_2_0(
            file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows, features)}
        )
        for part in parts:
            file.write(part.vectors.tobytes())


def _safetensors(path: Path, parts: Iterable[Part], rows: int, features: int, dtype: np.dtype) -> None:
    entry = {
        "dtype": _STORED[dtype.name],
        "shape": [rows, features],
        "data_offsets": [0, rows * features * dtype.itemsize],
    }
    header = json.dumps({"__metadata__": {"format": "np"}, "embeddings": entry}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for part in parts:
            file.write(part.vectors.tobytes())


def _parquet(path: Path, parts: Iterable[Part], rows: int, features: int, dtype: np.dtype) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.list_(pa.from_numpy_dtype(dtype), features)
    with_ids, parts = _peek(iter(parts))
    schema = pa.schema([*([("id", pa.string())] if with_ids else []), ("embedding", kind)])
    # Arrow opens no name that is not UTF-8.
    with path.open("wb") as file, pq.ParquetWriter(file, schema) as writer:
        for part in parts:
            flat = pa.array(part.vectors.reshape(-1))
            columns = [pa.array(part.ids, pa.string())] if with_ids else []
            writer.write_table(
                pa.Table.from_arrays([*columns, pa.FixedSizeListArray.from_arrays(flat, features)], schema=schema)
            )


def _peek(parts: Iterator[Part]) -> tuple[bool, Iterator[Part]]:
    """Whether the first part has ids, and all parts."""
    first = next(parts, None)
    if first is None:
        return False, iter(())

    def all_parts() -> Iterator[Part]:
        yield first
        yield from parts

    return bool(first.ids), all_parts()
