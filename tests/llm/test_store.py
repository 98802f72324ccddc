"""The store of answers: its format, damage, versions, and errors of SQLite."""

import hashlib
import json
import sqlite3

import pytest

from pyqemb.errors import DataError, MachineError
from pyqemb.llm import store as module
from pyqemb.llm.request import Answer
from pyqemb.llm.store import Store

REQUEST = {"messages": ["\u00e4"], "n": 1}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a" / "b" / "store.sqlite"


def rows(path):
    connection = sqlite3.connect(path)
    found = connection.execute("select * from answers order by key").fetchall()
    connection.close()
    return found


def change(path, statement, *values):
    connection = sqlite3.connect(path)
    connection.execute(statement, values)
    connection.commit()
    connection.close()


def digest(*row):
    return hashlib.blake2b(json.dumps(list(row)).encode(), digest_size=16).digest()


def test_answers_are_found_by_their_key(path, caplog):
    store = Store(str(path))
    assert store.path == path
    assert len(store) == 0
    assert store.get("k") is None
    first, second = Answer(text="one \u00e4"), Answer(text="two")
    store.put("k", REQUEST, second)
    store.put("k", REQUEST, first)  # replaces
    store.put("j", {}, second)
    for each in (store, Store(path)):
        assert len(each) == 2
        assert each.get("k") == first
        assert each.get("j") == second
        assert each.get("absent") is None
        assert list(each) == [("j", {}, second), ("k", REQUEST, first)]
    assert caplog.records == []
    store.close()
    with pytest.raises(DataError, match=r"Cannot operate on a closed database\.; the answers stored so far are kept$"):
        store.get("k")


def test_the_format(path):
    """Stores of earlier versions must stay readable."""
    store = Store(path)
    answer = Answer(text="\u00e4")
    store.put("k", REQUEST, answer)
    texts = "k", json.dumps(REQUEST, ensure_ascii=False), json.dumps(answer.row(), ensure_ascii=False)
    assert "\u00e4" in texts[1]
    assert rows(path) == [(*texts, digest(*texts))]
    run = store._connection.execute
    assert run("pragma user_version").fetchone() == (2,)
    assert run("pragma journal_mode").fetchone() == ("wal",)
    assert run("pragma synchronous").fetchone() == (2,)  # full: an answer that was paid for survives a power failure
    assert run("pragma cell_size_check").fetchone() == (1,)
    assert run("pragma trusted_schema").fetchone() == (0,)
    assert store._connection.isolation_level is None  # each put is committed at once
    assert run("select wr from pragma_table_list where name = 'answers'").fetchone() == (1,)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *((name, value) for name in ("key", "request", "answer", "digest") for value in ("x", b"\xff\xfe")),
        ("digest", None),
    ],
)
def test_damage_to_one_answer_costs_no_other(path, column, value, caplog):
    store = Store(path)
    for key in ("k", "l"):
        store.put(key, REQUEST, Answer(text="a"))
    store.close()
    change(path, f"update answers set {column} = ? where key = 'k'", value)
    store = Store(path)
    assert store.get("k") is None
    assert store.get("l") == Answer(text="a")
    assert [key for key, _, _ in store] == ["l"]
    assert {entry.getMessage() for entry in caplog.records} == {f"{path}: an answer is damaged; it is requested again"}
    store.put("k", REQUEST, Answer(text="b"))
    assert store.get("k") == Answer(text="b")


def test_text_of_another_encoding_is_damage(path):
    """It is replaced, not raised: the digest no longer matches."""
    store = Store(path)
    store.put("k", REQUEST, Answer(text="a"))
    store.close()
    change(path, "update answers set answer = cast(? as text)", b'{"text": "\xff"}')
    assert Store(path).get("k") is None


OLD = "create table answers (key text primary key, request text not null, answer text not null) without rowid"


def test_a_store_of_version_1_gets_digests(path):
    path.parent.mkdir(parents=True)
    connection = sqlite3.connect(path)
    connection.execute(OLD)
    answer = json.dumps(Answer(text="a").row())
    connection.executemany("insert into answers values (?, ?, ?)", [("k", "{}", answer), ("l", "{}", answer)])
    connection.commit()
    connection.close()
    store = Store(path)
    assert list(store) == [("k", {}, Answer(text="a")), ("l", {}, Answer(text="a"))]
    assert rows(path) == [(key, "{}", answer, digest(key, "{}", answer)) for key in "kl"]
    assert store._connection.execute("pragma user_version").fetchone() == (2,)


def test_an_upgrade_that_was_interrupted_continues(path):
    """The column is there, the version is not."""
    path.parent.mkdir(parents=True)
    connection = sqlite3.connect(path)
    connection.execute(OLD)
    connection.execute("alter table answers add column digest blob")
    connection.close()
    store = Store(path)
    store.put("k", {}, Answer(text="a"))
    assert store.get("k") == Answer(text="a")


def test_another_job_may_create_the_store_at_the_same_time(path, monkeypatch):
    """The version is read again under the lock."""
    Store(path).close()
    created, seen = [], []

    class Connection(sqlite3.Connection):
        def execute(self, statement, *values):
            if statement == "pragma user_version" and not seen:
                seen.append(statement)
                return super().execute("select 0")  # before the other job had committed
            created.append(statement)
            return super().execute(statement, *values)

    real = sqlite3.connect
    monkeypatch.setattr(module.sqlite3, "connect", lambda *a, **k: real(*a, **k, factory=Connection))
    store = Store(path)
    assert "begin immediate" in created
    assert not any("create table" in statement or "alter table" in statement for statement in created)
    assert created[-1] == "commit"
    store.put("k", {}, Answer(text="a"))
    assert Store(path).get("k") == Answer(text="a")  # the transaction is closed


def test_a_store_of_a_later_version_is_refused(path):
    Store(path).close()
    change(path, "pragma user_version = 3")
    with pytest.raises(DataError) as caught:
        Store(path)
    assert str(caught.value) == f"{path}: has version 3, this version reads 2"
    change(path, "pragma user_version = 2")
    Store(path).put("k", {}, Answer(text="a"))  # the refusal has left no lock


def test_what_is_no_store_is_named(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"something else, longer than a page header of SQLite " * 20)
    with pytest.raises(DataError) as caught:
        Store(path)
    assert str(caught.value) == f"{path}: cannot be used as a store of answers: file is not a database"
    with pytest.raises(DataError, match="cannot be used as a store of answers: unable to open database file"):
        Store(tmp_path)


@pytest.mark.parametrize(
    ("error", "number"),
    [(sqlite3.OperationalError("database or disk is full"), 28), (sqlite3.OperationalError("disk I/O error"), 5)],
)
def test_errors_of_the_machine(path, monkeypatch, error, number):
    class Connection(sqlite3.Connection):
        def execute(self, *_):
            raise error

    store = Store(path)
    store.put("k", {}, Answer(text="a"))
    store._connection.close()
    store._connection = Connection(":memory:")
    for call in (
        lambda: store.get("k"),
        lambda: len(store),
        lambda: list(store),
        lambda: store.put("k", {}, Answer(text="")),
    ):
        with pytest.raises(MachineError) as caught:
            call()
        assert str(caught.value) == f"{path}: {error}; the answers stored so far are kept"
        assert (caught.value.errno, caught.value.filename) == (number, str(path))
    real = sqlite3.connect
    monkeypatch.setattr(module.sqlite3, "connect", lambda *a, **k: real(*a, **k, factory=Connection))
    with pytest.raises(MachineError, match="cannot be written") as caught:
        Store(path)
    assert caught.value.errno == number


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match=r"store: cannot be written: File exists$"):
        Store(tmp_path / "file" / "store")


def test_a_job_waits_for_the_lock_of_another(path, monkeypatch):
    waited, real = [], sqlite3.connect
    monkeypatch.setattr(module.sqlite3, "connect", lambda *a, **k: (waited.append(k["timeout"]), real(*a, **k))[1])
    Store(path)
    assert waited == [60]


def test_a_request_that_is_no_json_is_refused(path):
    store = Store(path)
    with pytest.raises(TypeError, match=r"^\[put\] request must be values that JSON has: Object of type set"):
        store.put("key", {"texts": {"a"}}, Answer("text"))
    assert len(store) == 0
    store.close()
