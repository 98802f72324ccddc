"""Every request and its answer, on disk, by the request's content: nothing is ever asked twice."""

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyqemb.errors import DataError
from pyqemb.llm.request import Answer


class Store:
    """One SQLite file, safe against a kill at any moment; several jobs may share it.

    Raises DataError naming the file where it cannot be opened, is no store, or its disk is full; what it holds stays.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            self._connection.execute("pragma journal_mode = wal")
            self._connection.execute("pragma synchronous = normal")
            self._connection.execute(
                "create table if not exists answers (key text primary key, request text not null, answer text not null) "
                "without rowid"
            )
        except (sqlite3.Error, OSError) as error:
            raise DataError(f"{self.path}: cannot be used as a store of answers: {error}") from error

    def get(self, key: str) -> Answer | None:
        row = self._run("select answer from answers where key = ?", (key,)).fetchone()
        return None if row is None else Answer(**json.loads(row[0]))

    def put(self, key: str, request: dict[str, Any], answer: Answer) -> None:
        words = (json.dumps(value, ensure_ascii=False) for value in (request, answer.row()))
        self._run("insert or replace into answers values (?, ?, ?)", (key, *words))

    def __len__(self) -> int:
        return self._run("select count(*) from answers").fetchone()[0]

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any], Answer]]:
        """(key, request, answer) of everything, by key."""
        for key, request, answer in self._run("select key, request, answer from answers order by key"):
            yield key, json.loads(request), Answer(**json.loads(answer))

    def close(self) -> None:
        self._connection.close()

    def _run(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, values)
        except sqlite3.Error as error:
            raise DataError(f"{self.path}: {error}; the answers stored so far are kept") from error
