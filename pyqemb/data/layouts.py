"""The column layouts of training rows.

They are those of pyqemb, sentence-transformers, FlagEmbedding and ms-swift.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyqemb.data.columns import (
    IGNORE,
    LAYOUTS,
    LISTS,
    MESSAGES,
    NEGATIVES,
    NUMBERED_NEGATIVE,
    POSITIVE,
    QUERY,
    SCORE,
    ColumnMap,
    Columns,
    UnusedColumns,
)  # fmt: skip
from pyqemb.data.rows import Row, is_blank, kind_of, number_of, other_delimiter
from pyqemb.errors import DataError


@dataclass(frozen=True, slots=True)
class Example:
    """One training pair.

    instruction: the task sentence of the query (None: raw query).
    task: its kind or source.
    score: the similarity of query and positive, for graded pairs.
    scores: a teacher's scores of the positive and the negatives, in order.
    query_embedding, positive_embedding: a teacher's vectors.
    """

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    instruction: str | None = None
    task: str | None = None
    score: float | None = None
    scores: tuple[float, ...] = ()
    query_embedding: tuple[float, ...] = ()
    positive_embedding: tuple[float, ...] = ()


class Layout:
    """How the rows of one source are read as examples.

    Args:
        columns: the `columns` setting (default: the names of a known layout).
        cells: whether all values are text (CSV).
        in_memory: whether an unknown column is an error, as with `columns`; in files it is only counted.
        allow_empty: whether empty queries and positives are accepted.
    """

    def __init__(
        self, columns: Columns | None = None, *, cells: bool = False, in_memory: bool = False, allow_empty: bool = False
    ):
        self.columns, self.cells, self.allow_empty = ColumnMap(columns or {}, in_memory), cells, allow_empty
        self._strict = in_memory or bool(self.columns)
        self._unused = UnusedColumns()

    def examples(self, row: Row, where: str) -> Iterator[Example]:
        """Yield the examples of a row, one for each of its positives.

        Raises a DataError that names the place, the missing, invalid or unknown column, the columns of the row and the
        known columns.
        """
        columns = _Columns(row, where, self)
        query_key, positive_key = columns.first_of(*QUERY), columns.first_of(*POSITIVE)
        instruction = columns.text("instruction")
        if query_key == "messages":
            query, system, positives = columns.conversation("messages")
            instruction = instruction or system
        else:
            query, positives = columns.need(query_key), []
        positives = positives or columns.texts(positive_key, needed=True)
        negatives = [text for key in columns.negatives() for text in columns.texts(key)]
        if positive_key == "pos" and instruction is None:
            instruction = columns.text("prompt")
        task = columns.text("task")
        score = columns.numbers(columns.first_of(*SCORE), many=False)
        scores = columns.teacher_scores(positives, negatives, of_lists=positive_key == "pos")
        vectors = [columns.numbers(key) for key in ("query_embedding", "positive_embedding")]
        if any(vectors) and len(positives) > 1:
            raise columns.bad(positive_key, "must be one text beside a teacher's vectors")
        self._check_unused(columns.unused(), row, where)
        for positive, own in zip(positives, scores, strict=True):
            yield Example(
                query, positive, tuple(negatives), instruction, task, score[0] if score else None, own, *vectors
            )

    def finish(self, source: Any) -> None:
        """After the last row: warn of unused columns. DataError: `columns` names one that no row has."""
        self.columns.check_seen(source)
        self._unused.warn(source)

    def _check_unused(self, unused: list[str], row: Row, where: str) -> None:
        if unused and self._strict:
            raise DataError(
                f"{where}: column {', '.join(map(repr, unused))} is not understood; the row has {sorted(row)}; "
                f"accepted are {LAYOUTS}; name it, or leave it out: {self.columns.shown({IGNORE: unused})}"
            )
        self._unused.add(unused, where)


class _Columns:
    """Reads the columns of a row and records which were read."""

    def __init__(self, row: Row, where: str, layout: Layout):
        self._row, self._where, self._map = layout.columns.rename(row, where), where, layout.columns
        self._found = sorted(row)
        self._cells, self._allow_empty = layout.cells, layout.allow_empty
        self._used: set[str] = set()

    def bad(self, key: str, message: str) -> DataError:
        return DataError(f"{self._where}: column {self._map.source(key)!r} {message}")

    def first_of(self, *names: str) -> str:
        """The first of the names that the row has, or the first name if it has none."""
        return next((key for key in names if key in self._row), names[0])

    def negatives(self) -> list[str]:
        """The names of the columns that may hold negatives."""
        numbered = sorted((int(match[1]), key) for key in self._row if (match := NUMBERED_NEGATIVE.fullmatch(key)))
        return [*NEGATIVES, *(key for _, key in numbered)]

    def unused(self) -> list[str]:
        """The columns that are not empty and were not read."""
        return sorted(key for key in self._row.keys() - self._used if self._row[key] is not None)

    def text(self, key: str) -> str | None:
        """The text of a column that may be absent or null."""
        value = self._get(key)
        if value is None or isinstance(value, str):
            return value
        raise self.bad(key, f"must be text, got {kind_of(value)}")

    def need(self, key: str) -> str:
        """The text of a column that must not be empty."""
        if key not in self._row:
            raise self.bad(key, f"is missing; the row has {self._found}{self._hint()}; accepted are {LAYOUTS}")
        value = self._get(key)
        if not isinstance(value, str) and not (value is None and self._cells):
            raise self.bad(key, f"must be text, got {kind_of(value)}")
        if not self._allow_empty and is_blank(value or ""):
            raise self.bad(key, "is empty")
        return value or ""

    def texts(self, key: str, needed: bool = False) -> list[str]:
        """The texts of a column that holds one text or a list; unless `needed`, it may be absent or null."""
        value = self._get(key)
        if not isinstance(value, list):
            if needed:
                return [self.need(key)]
            if value is None:
                return []
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list):
            raise self.bad(key, f"must be text or a list of texts, got {kind_of(value)}")
        if key in MESSAGES:
            # A list of conversations, or one conversation.
            conversations = [values] if values and isinstance(values[0], dict) else values
            values = [self._one_message(key, conversation) for conversation in conversations]
        for index, item in enumerate(values):
            if not isinstance(item, str):
                raise self.bad(key, f"must hold texts, got {kind_of(item)} at index {index}")
            if needed and not self._allow_empty and is_blank(item):
                raise self.bad(key, f"is empty at index {index}")
        if needed and not values:
            raise self.bad(key, "is an empty list")
        return values

    def numbers(self, key: str, many: bool = True) -> tuple[float, ...]:
        """The numbers of a column that may be absent or null: a list or, unless `many`, one number."""
        value = self._get(key)
        if value is None:
            return ()
        values = value if many else [value]
        if not isinstance(values, list):
            raise self.bad(key, f"must be a list of numbers, got {kind_of(value)}")
        if self._cells:
            values = [item if (number := number_of(item)) is None else number for item in values]
        for item in values:
            if isinstance(item, bool) or not isinstance(item, int | float) or not math.isfinite(item):
                raise self.bad(key, f"must hold finite numbers, got {item!r}")
        return tuple(float(item) for item in values)

    def teacher_scores(self, positives: list[str], negatives: list[str], of_lists: bool) -> list[tuple[float, ...]]:
        """For each positive, its score and those of the negatives; empty without scores."""
        scores = self.numbers("scores")
        if scores and (len(positives) > 1 or len(scores) != 1 + len(negatives)):
            raise self.bad(
                "scores",
                f"must hold {1 + len(negatives)} numbers, one for the positive and each negative, got {len(scores)}",
            )
        if not of_lists or scores:
            return [scores] * len(positives)
        of_positives, of_negatives = self.numbers("pos_scores"), self.numbers("neg_scores")
        if not of_positives and not of_negatives:
            return [()] * len(positives)
        for key, given, texts in (("pos_scores", of_positives, positives), ("neg_scores", of_negatives, negatives)):
            if len(given) != len(texts):
                raise self.bad(key, f"must hold {len(texts)} numbers, one for each text, got {len(given)}")
        return [(own, *of_negatives) for own in of_positives]

    def conversation(self, key: str) -> tuple[str, str | None, list[str]]:
        """(query, system message, answers) of ms-swift's messages."""
        messages = self._get(key)
        system: str | None = None
        turns: list[dict[str, str]] = []
        for message in self._messages(key, messages):
            if message["role"] == "system" and system is None and not turns:
                system = message["content"]
            else:
                turns.append(message)
        if [turn["role"] for turn in turns] not in (["user"], ["user", "assistant"]):
            raise self.bad(key, "must hold one message of the user, perhaps after a system message or before an answer")
        texts = [turn["content"] for turn in turns]
        if not self._allow_empty and any(map(is_blank, texts)):
            raise self.bad(key, "has an empty message")
        if len(texts) == 2 and "positive_messages" in self._row:
            raise self.bad(key, "has an answer, and there are positive_messages; give one of them")
        return texts[0], system, texts[1:]

    def _one_message(self, key: str, conversation: Any) -> str:
        messages = self._messages(key, conversation)
        if len(messages) != 1 or messages[0]["role"] not in ("user", "assistant"):
            raise self.bad(key, "must hold lists of one message of a user or an assistant each")
        return messages[0]["content"]

    def _messages(self, key: str, messages: Any) -> list[dict[str, str]]:
        for message in messages if isinstance(messages, list) and messages else [None]:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise self.bad(
                    key, f"must hold messages like {{'role': 'user', 'content': '...'}}, got {kind_of(message)}"
                )
        return messages

    def _hint(self) -> str:
        """A hint about similar or unknown names, for the middle of an error."""
        known = {*QUERY, *POSITIVE, *NEGATIVES}
        renamed = [name for name in self._row if name not in known and name.strip().lower() in known]
        if renamed:
            return "; " + ", ".join(f"rename {name!r} to {name.strip().lower()!r}" for name in renamed)
        if self._cells and (delimiter := other_delimiter(self._row)):
            return delimiter
        missing = [names[0] for names in (QUERY, POSITIVE) if self.first_of(*names) not in self._row]
        others = [name for name, value in self._row.items() if name not in known and isinstance(value, str | list)]
        guess = {name: [other] for name, other in zip(missing, [*others, "...", "..."], strict=False)}
        if rest := [name for name in self._row if name not in known and [name] not in guess.values()]:
            guess[IGNORE] = rest
        return f"; say which column it is, for example {self._map.shown(guess)}"

    def _get(self, key: str) -> Any:
        self._used.add(key)
        value = self._row.get(key)
        if self._cells and value is not None and key in LISTS | set(MESSAGES):
            raise self.bad(
                key, "is a list, which a cell cannot hold; use JSONL or Parquet, or negative_1 ... negative_n"
            )
        return value
