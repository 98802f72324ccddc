"""The column names of rows, and the `columns` setting, which maps other names to them."""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from pyqemb.data.rows import Row
from pyqemb.errors import ConfigError, DataError

LAYOUTS = (
    "query, positive, negative(s); anchor, positive, negative or negative_1 ... negative_n; sentence1, sentence2, "
    "score or label; question, answer; query, answer (sentence-transformers); query, pos, neg (FlagEmbedding); "
    "messages, positive_messages, negative_messages; query, response, rejected_response (ms-swift)"
)
QUERY = ("query", "anchor", "sentence1", "question", "messages")
POSITIVE = ("positive", "sentence2", "pos", "answer", "response", "positive_messages")
NEGATIVES = ("negatives", "negative", "neg", "rejected_response", "negative_messages")
SCORE = ("score", "label")
NUMBERED_NEGATIVE = re.compile(r"negative_(\d+)")
LISTS = {"negatives", "neg", "scores", "pos_scores", "neg_scores", "query_embedding", "positive_embedding"}
MESSAGES = ("messages", "positive_messages", "negative_messages")
# pyqemb's own names: those of `Example`, and those that `columns` may use.
OWN = (
    "query", "positive", "negatives", "instruction", "task", "score", "scores", "query_embedding", "positive_embedding",
)  # fmt: skip
IGNORE = "ignore"  # in `columns`: the columns that are ignored

Columns = Mapping[str, str | Sequence[str]]  # pyqemb's name -> column of the rows, or several (negatives, ignore)


class ColumnMap:
    """Renames the columns of rows by the `columns` setting.

    Args:
        columns: {"query": "question", "negatives": ["hard_1", "hard_2"], "ignore": ["id"]}: pyqemb's name, and the
            column that it is read from; `negatives` and `ignore` may name several.
        in_memory: messages show the setting as Python instead of TOML.

    Raises:
        ConfigError: a name that pyqemb does not know, or a column that is named twice.
    """

    def __init__(self, columns: Columns, in_memory: bool = False):
        self._in_memory = in_memory
        self._columns = {name: [given] if isinstance(given, str) else list(given) for name, given in columns.items()}
        for name, sources in self._columns.items():
            if name not in (*OWN, IGNORE):
                raise ConfigError(
                    f"columns: {name!r} is not a column of pyqemb; expected some of {', '.join(OWN)}, {IGNORE}"
                )
            if not sources or not all(isinstance(source, str) and source for source in sources):
                raise ConfigError(f"columns: {name!r} must be the name of a column, got {columns[name]!r}")
            if len(sources) > 1 and name not in ("negatives", IGNORE):
                raise ConfigError(f"columns: {name!r} must be one column, got {sources}")
        every = [source for sources in self._columns.values() for source in sources]
        if twice := {source for source in every if every.count(source) > 1}:
            raise ConfigError(f"columns: {min(twice)!r} is named twice")
        self._names = {source: name for name, sources in self._columns.items() for source in sources}
        for number, source in enumerate(self._columns.get("negatives", ()), start=1):
            self._names[source] = f"negative_{number}"  # it may hold one text or a list
        self._sources = {name: source for source, name in self._names.items()}
        self._unseen = set(every)

    def rename(self, row: Row, where: str) -> Row:
        """The row with pyqemb's names. DataError: it also has another column with one of these names."""
        if not self._columns:
            return row
        self._unseen -= row.keys()
        renamed: Row = {}
        for column, value in row.items():
            name = self._names.get(column)
            if name is None and (own := _own_name(column)) in self._columns:
                raise DataError(
                    f"{where}: column {column!r} exists beside {self._columns[own]}, which `columns` reads as {own}; "
                    f"name it, or leave it out: {self.shown({IGNORE: [column]})}"
                )
            if name != IGNORE:
                renamed[name or column] = value
        return renamed

    def source(self, name: str) -> str:
        """The column of the rows that is read as `name`."""
        return self._sources.get(name, name)

    def shown(self, more: Mapping[str, Sequence[str]]) -> str:
        """The setting with further columns, as it is written in Python or TOML."""
        merged = {name: [*self._columns.get(name, ()), *more.get(name, ())] for name in (*self._columns, *more)}
        values = {name: given if len(given) > 1 or name == IGNORE else given[0] for name, given in merged.items()}
        if self._in_memory:
            return f"columns={json.dumps(values, ensure_ascii=False)}"
        pairs = (f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items())
        return f"columns = {{{', '.join(pairs)}}}"

    def check_seen(self, source: Any) -> None:
        """DataError if the setting names a column that no row had."""
        if self._unseen:
            raise DataError(f"{source}: columns names {', '.join(map(repr, sorted(self._unseen)))}, which no row has")

    def __bool__(self) -> bool:
        return bool(self._columns)


def parse_columns(arguments: Iterable[str]) -> Columns | None:
    """The setting from the NAME=COLUMN arguments of the command line; negatives and ignored columns may be repeated.

    ConfigError: not NAME=COLUMN, or an invalid setting.

    Example:
        >>> parse_columns(["query=question", "ignore=id", "ignore=url"])
        {'query': ['question'], 'ignore': ['id', 'url']}
    """
    columns: dict[str, list[str]] = {}
    for argument in arguments:
        name, equals, column = argument.partition("=")
        if not equals:
            raise ConfigError(f"--column: expected NAME=COLUMN, such as query=question, got {argument!r}")
        columns.setdefault(name, []).append(column)
    ColumnMap(columns)
    return columns or None


@lru_cache
def _own_name(column: str) -> str:
    """The name in pyqemb of a column in the known layouts; else the name of the column."""
    if NUMBERED_NEGATIVE.fullmatch(column):
        return "negatives"
    groups = {"query": QUERY, "positive": POSITIVE, "negatives": NEGATIVES, "score": SCORE}
    return next((name for name, columns in groups.items() if column in columns), column)


@dataclass
class UnusedColumns:
    """Unused columns: the number of rows that have each, and the first place."""

    _found: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, names: Iterable[str], where: str) -> None:
        """Count the columns `names` of one row; `where` is its place, "file:line"."""
        for name in sorted(names):
            self._found.setdefault(name, [0, where])[0] += 1

    def warn(self, source: Any) -> None:
        """Log one line, if there are any."""
        if self:
            logging.getLogger("pyqemb").warning("%s: columns that are not used: %s", source, self)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __bool__(self) -> bool:
        return bool(self._found)

    def __str__(self) -> str:
        return ", ".join(f"{name!r} ({count:,} rows, first {at})" for name, (count, at) in self._found.items())
