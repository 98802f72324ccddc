"""Float32 vectors as .npy files. numpy's own reader allocates what a header says, and its errors have many types."""

import io
import re

import numpy as np

from pyqemb.errors import DataError

_HEADER = re.compile(
    rb"\x93NUMPY\x01\0..\{'descr': '<f4', 'fortran_order': False, 'shape': \((\d{1,18}), (\d{1,18})\), \} *\n",
    re.DOTALL,
)


def npy(array: np.ndarray) -> tuple[bytes, memoryview]:
    """The header and the content of an .npy file."""
    header, array = io.BytesIO(), np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return header.getvalue(), array.data


def read_vectors(content: bytes, where: str) -> np.ndarray:
    """float32 [N, E] of the content of an .npy file; DataError if it has anything else."""
    header = _HEADER.match(content)
    if header is not None:
        count, size = map(int, header.groups())
        if 4 * count * size == len(content) - header.end():
            return np.frombuffer(content, "<f4", offset=header.end()).reshape(count, size).copy()
    raise DataError(f"{where}: damaged: expected an .npy file of float32 vectors")
