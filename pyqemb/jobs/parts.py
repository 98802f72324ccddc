"""A part of a job on disk: a deterministic slice of the input, with its own files and their checksums.

00000000.npy    the vectors of part 0, float32; written last
00000000.ids    its ids, a JSON string a line, where the rows have ids
00000000.json   sealed: which job, part and texts these are, and the sha256 of the files above

A part whose last file exists is complete. Whoever makes a part makes the same bytes.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pyqemb.data import strict_json
from pyqemb.data.files import atomic_file
from pyqemb.data.machine import unreadable
from pyqemb.data.npy import npy, read_vectors
from pyqemb.data.sealed import seal, unseal
from pyqemb.errors import DataError

_FORMAT = 1
Chunks = Sequence[bytes | memoryview]  # the content of a file


class DamagedPartError(DataError):
    """A part with a missing or damaged file."""


@dataclass(frozen=True)
class Part:
    """The files of a part.

    Args:
        path: the file that is written last; the other files are beside it and differ in the suffix.
        job: a digest of the settings of the job.
        texts: a digest of the part's rows; None if it is not known, and then it is not compared.
    """

    path: Path
    job: str
    texts: str | None
    others: ClassVar[tuple[str, ...]] = ()  # suffixes of the files that a part may have besides `path`

    def started(self) -> bool:
        """Whether an earlier run has written a file of this part."""
        return self.path.exists() or self.path.with_suffix(".json").exists()

    def verify(self) -> None:
        """DamagedPartError if any of the files is missing, damaged or belongs to another part."""
        for suffix in (self.path.suffix, *self.others):
            if self.read(suffix) is None and suffix == self.path.suffix:
                raise DamagedPartError(f"{self.path.with_suffix('.json')}: damaged: names no {suffix} file")

    def is_whole(self) -> bool:
        """Whether all files of the part exist and are intact. A warning names a damaged one."""
        if not self.started():
            return False
        try:
            self.verify()
        except DamagedPartError as error:
            logging.getLogger("pyqemb").warning("%s; the part is made again", error)
            return False
        return True

    def write_files(self, files: Mapping[str, Chunks]) -> None:
        """Write the files by suffix, and the manifest of the part. The file `path` is written last."""
        digests = {suffix: _sha256(chunks) for suffix, chunks in files.items()}
        for suffix in [*(suffix for suffix in files if suffix != self.path.suffix), ".json", self.path.suffix]:
            sealed = seal({**self._facts(), "files": digests})
            with atomic_file(self.path.with_suffix(suffix)) as temporary, temporary.open("wb") as file:
                for chunk in [sealed] if suffix == ".json" else files[suffix]:
                    file.write(chunk)

    def read(self, suffix: str) -> bytes | None:
        """The content of a file of the part; None if the part has no such file. DamagedPartError if it is damaged."""
        files = self._sealed()
        if suffix not in files:
            return None
        path = self.path.with_suffix(suffix)
        content = _bytes(path)
        if _sha256([content]) != files[suffix]:
            raise DamagedPartError(f"{path}: damaged: it does not match its checksum")
        return content

    def _facts(self) -> dict[str, Any]:
        return {"format": _FORMAT, "job": self.job, "part": self.path.stem, "texts": self.texts}

    def _sealed(self) -> dict[str, Any]:
        """The checksums of the files by suffix."""
        path = self.path.with_suffix(".json")
        try:
            sealed = unseal(_bytes(path), str(path))
        except DataError as error:
            raise DamagedPartError(str(error)) from error
        files, facts = sealed.pop("files", None), self._facts()
        if self.texts is None:
            facts["texts"] = sealed.get("texts")
        if sealed != facts or not isinstance(files, dict):
            raise DamagedPartError(f"{path}: belongs to another part")
        return files


@dataclass(frozen=True)
class VectorPart(Part):
    """The vectors of some texts, and their ids; `path` is an .npy file."""

    others: ClassVar[tuple[str, ...]] = (".ids",)

    def vectors(self) -> np.ndarray:
        """float32 [N, E]. DamagedPartError if they are damaged."""
        try:
            return read_vectors(self.read(".npy") or b"", str(self.path))
        except DataError as error:
            raise DamagedPartError(str(error)) from error

    def ids(self) -> list[str]:
        """The ids of the rows in order, empty if they have none. DamagedPartError if they are damaged."""
        lines = (self.read(".ids") or b"").splitlines()
        path = self.path.with_suffix(".ids")
        try:
            found = [strict_json.parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
        except DataError as error:
            raise DamagedPartError(str(error)) from error
        if not all(isinstance(key, str) for key in found):
            raise DamagedPartError(f"{path}: expected a JSON string a line")
        return found

    def write(self, vectors: np.ndarray, ids: Sequence[str] | None) -> None:
        """Write vectors, float32 [N, E], and the ids of the rows, None if they have none."""
        files: dict[str, Chunks] = {".npy": npy(vectors)}
        if ids is not None:
            files[".ids"] = ["".join(f"{json.dumps(key)}\n" for key in ids).encode()]
        self.write_files(files)


@dataclass(frozen=True)
class CandidatesPart(Part):
    """The best documents of some queries. `path` is an .npy file of scores; those of the positives come first."""

    others: ClassVar[tuple[str, ...]] = (".indices",)

    def candidates(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores [N, K] float32, best first, and indices [N, K] int64. DamagedPartError if they are damaged."""
        scores = self._scores()[:, 1:]
        content = self.read(".indices") or b""
        if len(content) != 8 * scores.size:
            raise DamagedPartError(f"{self.path.with_suffix('.indices')}: damaged: expected {scores.size} indices")
        return scores, np.frombuffer(content, "<i8").reshape(scores.shape)

    def positive_scores(self) -> np.ndarray:
        """float32 [N]. DamagedPartError if they are damaged."""
        return self._scores()[:, 0]

    def write(self, scores: np.ndarray, indices: np.ndarray, positive_scores: np.ndarray) -> None:
        """Write scores [N, K] float32, best first, padded with -inf; indices [N, K] int64; positive_scores [N]."""
        table = np.concatenate([positive_scores[:, None], scores], axis=1).astype("<f4", copy=False)
        self.write_files({".npy": npy(table), ".indices": [np.ascontiguousarray(indices, "<i8").data.cast("B")]})

    def _scores(self) -> np.ndarray:
        try:
            table = read_vectors(self.read(".npy") or b"", str(self.path))
        except DataError as error:
            raise DamagedPartError(str(error)) from error
        if not table.shape[1]:
            raise DamagedPartError(f"{self.path}: damaged: expected the score of a positive in each row")
        return table


def texts_digest(rows: Sequence[Any]) -> str:
    """Return the sha256 of rows, e.g. of (id, text) each, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _sha256(chunks: Chunks) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error, DamagedPartError) from error
