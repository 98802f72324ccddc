"""A store of requests and answers on disk, by the content of the request."""

import hashlib
import json
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyqemb.data.arguments import checked
from pyqemb.data.files import make_folder
from pyqemb.data.machine import errno_of, reading, unwritable
from pyqemb.errors import DataError, MachineError, PyqembError
from pyqemb.llm.request import Answer

_VERSION = 2  # SQLite's user_version; a store of version 1, without digests, is upgraded when it is opened
_ERRORS = sqlite3.Error, UnicodeDecodeError  # the latter if a message of SQLite quotes damaged text
log = logging.getLogger("pyqemb")


class Store:
    """One SQLite file, safe against killed processes and power failures; several jobs may share it.

    Each answer has a digest; a damaged answer counts as missing and is requested again.

    Raises a DataError that names the file if it cannot be opened, is not a store or is damaged, and MachineError if its
    disk is full or fails; the stored answers are kept.
    """

    @checked
    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            make_folder(self.path.parent)
            self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        except (*_ERRORS, OSError) as error:
            raise self._unusable(error) from error
        try:
            for setting in ("journal_mode = wal", "synchronous = full", "cell_size_check = on", "trusted_schema = off"):
                self._connection.execute(f"pragma {setting}")
            self._connection.text_factory = lambda raw: raw.decode(
                "utf-8", "replace"
            )  # damaged answers have another digest
            self._create()
        except BaseException as error:
            self.close()  # releases the lock, which other jobs wait for
            if isinstance(error, _ERRORS):
                raise self._unusable(error) from error
            raise

    def _unusable(self, error: Exception) -> PyqembError:
        if errno_of(error) is not None:
            return unwritable(self.path, error)
        self._check_readable()
        return DataError(f"{self.path}: cannot be used as a store of answers: {error}")

    def _check_readable(self) -> None:
        """MachineError if the machine fails to read the file, which SQLite calls damage."""
        with suppress(FileNotFoundError, IsADirectoryError), reading(self.path), self.path.open("rb") as file:
            while file.read(1 << 22):
                pass

    def _create(self) -> None:
        run = self._connection.execute
        if run("pragma user_version").fetchone()[0] == _VERSION:
            return
        run("begin immediate")  # one job at a time
        version = run("pragma user_version").fetchone()[0]
        if version > _VERSION:
            raise DataError(f"{self.path}: has version {version}, this version reads {_VERSION}")
        if version < _VERSION:
            run(
                "create table if not exists answers (key text primary key, request text not null, answer text not "
                "null) without rowid"
            )
            if "digest" not in [column[1] for column in run("pragma table_info(answers)")]:
                run("alter table answers add column digest blob")
                self._connection.create_function("digest_of", 3, _digest, deterministic=True)
                run("update answers set digest = digest_of(key, request, answer)")
            run(f"pragma user_version = {_VERSION}")
        run("commit")

    @checked
    def get(self, key: str) -> Answer | None:
        """Return the stored answer of a request's key; None if there is none or it is damaged."""
        with self._named():
            row = self._run("select key, request, answer, digest from answers where key = ?", (key,)).fetchone()
        return Answer(**json.loads(row[2])) if row is not None and self._is_sound(row) else None

    @checked
    def put(self, key: str, request: dict[str, Any], answer: Answer) -> None:
        """Store a request and its answer under the request's key; an older answer is replaced."""
        try:
            row = (key, *(json.dumps(value, ensure_ascii=False) for value in (request, answer.row())))
        except (TypeError, ValueError) as error:
            raise TypeError(f"[put] request must be values that JSON has: {error}") from error
        self._run("insert or replace into answers values (?, ?, ?, ?)", (*row, _digest(*row)))

    def __len__(self) -> int:
        with self._named():
            return self._run("select count(*) from answers").fetchone()[0]

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any], Answer]]:
        """Yield (key, request, answer) of all answers, ordered by key."""
        with self._named():
            for row in self._run("select key, request, answer, digest from answers order by key"):
                if self._is_sound(row):
                    yield row[0], json.loads(row[1]), Answer(**json.loads(row[2]))

    def _is_sound(self, row: tuple[Any, ...]) -> bool:
        sound = all(isinstance(text, str) for text in row[:3]) and row[3] == _digest(*row[:3])
        if not sound:
            log.warning("%s: an answer is damaged; it is requested again", self.path)
        return sound

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _run(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        with self._named():
            return self._connection.execute(statement, values)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except _ERRORS as error:
            message = f"{self.path}: {error}; the answers stored so far are kept"
            number = errno_of(error)
            if number is None:
                self._check_readable()
            raise (DataError(message) if number is None else MachineError(message, number, str(self.path))) from error


def _digest(key: str, request: str, answer: str) -> bytes:
    row = json.dumps([key, request, answer])
    return hashlib.blake2b(row.encode(), digest_size=16).digest()
