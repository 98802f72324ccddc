"""A part of a job on disk, with checksums.

00000000.npy    the vectors of part 0, float32; written last
00000000.ids    its ids, a JSON string a line, where the rows have ids
00000000.json   sealed: which job, part and texts these are, and the sha256 of the files above
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyqemb.data import strict_json
from pyqemb.data.files import atomic_file
from pyqemb.data.machine import unreadable
from pyqemb.data.npy import npy, read_vectors
from pyqemb.data.sealed import seal, unseal
from pyqemb.encoding.inputs import Row
from pyqemb.errors import DataError

_FORMAT = 1


class DamagedPartError(DataError):
    """A part with a missing or damaged file."""


@dataclass(frozen=True)
class PartFiles:
    """The files of a part.

    Args:
        path: the file of the vectors; the other files are beside it.
        job: a digest of the settings of the job.
        texts: a digest of the part's rows.
    """

    path: Path
    job: str
    texts: str

    def started(self) -> bool:
        """Whether an earlier run has written a file of this part."""
        return self.path.exists() or self.path.with_suffix(".json").exists()

    def vectors(self) -> np.ndarray:
        """float32 [N, E]. DamagedPartError if they are damaged."""
        try:
            return read_vectors(self._read(".npy") or b"", str(self.path))
        except DataError as error:
            raise DamagedPartError(str(error)) from error

    def ids(self) -> list[str]:
        """The ids of the rows in order, empty if they have none. DamagedPartError if they are damaged."""
        lines = (self._read(".ids") or b"").splitlines()
        path = self.path.with_suffix(".ids")
        try:
            found = [strict_json.parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
        except DataError as error:
            raise DamagedPartError(str(error)) from error
        if not all(isinstance(key, str) for key in found):
            raise DamagedPartError(f"{path}: expected a JSON string a line")
        return found

    def verify(self) -> None:
        """DamagedPartError if any of the files is damaged or belongs to another part."""
        for suffix in (".npy", ".ids"):
            self._read(suffix)

    def write(self, vectors: np.ndarray, ids: Sequence[str] | None) -> None:
        """Write all files except the vectors (`save_array`), which are written last and complete the part."""
        files = {".npy": hashlib.sha256(b"".join(npy(vectors))).hexdigest()}
        if ids is not None:
            content = "".join(f"{json.dumps(key)}\n" for key in ids).encode()
            files[".ids"] = hashlib.sha256(content).hexdigest()
            with atomic_file(self.path.with_suffix(".ids")) as temporary:
                temporary.write_bytes(content)
        with atomic_file(self.path.with_suffix(".json")) as temporary:
            temporary.write_bytes(seal({**self._facts(), "files": files}))

    def _facts(self) -> dict[str, Any]:
        return {"format": _FORMAT, "job": self.job, "part": self.path.stem, "texts": self.texts}

    def _read(self, suffix: str) -> bytes | None:
        """The content of a file of the part; None if the part has no such file."""
        path = self.path.with_suffix(".json")
        try:
            sealed = unseal(_bytes(path), str(path))
        except DataError as error:
            raise DamagedPartError(str(error)) from error
        files = sealed.pop("files", None)
        if sealed != self._facts() or not isinstance(files, dict):
            raise DamagedPartError(f"{path}: belongs to another part")
        if suffix not in files:
            return None
        content = _bytes(self.path.with_suffix(suffix))
        if hashlib.sha256(content).hexdigest() != files[suffix]:
            raise DamagedPartError(f"{self.path.with_suffix(suffix)}: damaged: it does not match its checksum")
        return content


def texts_digest(rows: Sequence[Row]) -> str:
    """Return the sha256 of the ids and texts of rows, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error, DamagedPartError) from error
