"""Examples in memory-mapped files: the same examples, found by number, with a manifest that tells the truth."""

import json
import subprocess
import sys
import textwrap

import pyarrow as pa
import pyarrow.parquet
import pytest

from pyqemb.data import shards as module
from pyqemb.data.example import Example, read_examples
from pyqemb.data.shards import is_shards, read_shards, shards_of_parquet, write_shards
from pyqemb.errors import DataError

EXAMPLES = [
    Example(
        f"q{i}\n…", f"p{i}", tuple(f"n{j}" for j in range(i % 4)), "Find" if i % 2 else None,
        None if i % 3 else "sts", 0.5 * i if i % 3 == 0 else None,
    )
    for i in range(40)
] + [
    Example(
        "t", "p", ("n",), task="distillation", scores=(1.0, -0.25), query_embedding=(0.1, 0.2),
        positive_embedding=(0.3, 0.4),
    )
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 4)
    assert write_shards(tmp_path / "shards", EXAMPLES, rows_per_file=12) == 41
    return tmp_path / "shards"


def test_what_was_written_is_read(folder):
    tasks = read_shards(folder)
    assert set(tasks) == {None, "sts", "distillation"}
    assert is_shards(folder)
    for task, found in tasks.items():
        wanted = [example for example in EXAMPLES if example.task == task]
        assert len(found) == len(wanted)
        assert list(found) == wanted
        assert [found[i] for i in range(len(found))] == wanted
        assert found[-1] == wanted[-1]
        assert found[1:4] == wanted[1:4]
        with pytest.raises(IndexError):
            found[len(found)]
    assert sorted(map(repr, read_examples(folder))) == sorted(map(repr, EXAMPLES))
    assert len(list(folder.glob("00000-*.arrow"))) > 1


def test_the_manifest_knows_what_checks_ask_for(folder):
    tasks = read_shards(folder)
    sts = tasks["sts"].summary
    assert (sts.rows, sts.score, sts.most_negatives, set(sts.instructions)) == (14, 14, 3, {"Find", None})
    assert tasks["distillation"].summary.scores == tasks["distillation"].summary.query_embedding == 1
    assert tasks[None].instructions == {"Find", None}
    told = tasks[None].with_instruction("Search")
    assert told.instructions == {"Find", "Search"}
    assert told[0].instruction in ("Find", "Search")
    assert {e.instruction for e in told} == {"Find", "Search"}
    assert tasks[None].instructions == {"Find", None}
    assert told.digest != tasks[None].digest


def test_a_digest_is_of_the_rows(folder, tmp_path):
    write_shards(tmp_path / "same", EXAMPLES, rows_per_file=1000)
    write_shards(tmp_path / "other", [*EXAMPLES[:-2], EXAMPLES[-1], EXAMPLES[-2]])
    one, same, other = (read_shards(path)["sts"].digest for path in (folder, tmp_path / "same", tmp_path / "other"))
    assert one == same == other
    write_shards(tmp_path / "other", [EXAMPLES[3], EXAMPLES[0], *EXAMPLES[1:3], *EXAMPLES[4:]])
    assert read_shards(tmp_path / "other")["sts"].digest != one


def test_damage_is_named(folder, tmp_path):
    next(folder.glob("00000-00001.arrow")).write_bytes(b"ARROW1\0\0nothing")
    with pytest.raises(DataError, match=r"00000-00001\.arrow: not a readable shard"):
        read_shards(folder)
    (folder / "manifest.json").write_text(json.dumps({"format": "pyqemb-shards-9", "tasks": []}))
    with pytest.raises(DataError, match="has format 'pyqemb-shards-9'"):
        read_shards(folder)
    with pytest.raises(DataError, match="no examples to write"):
        write_shards(tmp_path / "none", [])
    assert not (tmp_path / "none").exists()


# Reads every row of every task of a folder whose bytes are changed, one after the other; a crash would end the process.
FLIPS = """
    import sys
    from pathlib import Path
    from pyqemb.data.shards import read_shards
    from pyqemb.errors import DataError
    folder = Path(sys.argv[1])
    truth = {task: list(rows) for task, rows in read_shards(folder).items()}
    refused = right = 0

    def check(path):
        global refused, right
        try:
            found = {task: [rows[i] for i in range(len(rows))] for task, rows in read_shards(folder).items()}
        except DataError as error:
            assert path.name in str(error) or str(folder) in str(error), error
            refused += 1
            return
        assert found == truth, path
        right += 1

    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        for at in range(len(raw)):
            for mask in (1 << at % 8, 0xFF):
                path.write_bytes(raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :])
                check(path)
        for size in range(0, len(raw), 7):
            path.write_bytes(raw[:size])
            check(path)
        path.unlink()
        check(path)
        path.write_bytes(raw)
    a, b = sorted(folder.glob("*.arrow"))[:2]
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two)
    b.write_bytes(one)
    check(a)
    print(refused, right)
"""


@pytest.mark.promise("R19", "each byte of shards of rows changed")
def test_a_changed_byte_is_never_read_as_data(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 2)
    write_shards(tmp_path / "shards", [EXAMPLES[0], EXAMPLES[1], EXAMPLES[2], EXAMPLES[3], EXAMPLES[-1]])
    size = sum(path.stat().st_size for path in (tmp_path / "shards").iterdir())
    command = [sys.executable, "-c", textwrap.dedent(FLIPS), str(tmp_path / "shards")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, right = map(int, done.stdout.split())
    assert refused + right > 2 * size
    assert refused > size / 2


def test_files_of_an_older_version_are_named(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": "pyqemb-shards-1"}))
    with pytest.raises(DataError, match="has format 'pyqemb-shards-1', this version reads 'pyqemb-shards-2'"):
        read_shards(folder)


def test_parquet_files_become_shards_once(tmp_path):
    for number in range(2):
        rows = [{"query": f"{number}{i}", "positive": "p", "negatives": ["n"]} for i in range(5)]
        pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"{number}.parquet")
    assert len(list(read_examples(tmp_path))) == 10
    first = shards_of_parquet(tmp_path, read_examples(tmp_path))
    made = (first / "manifest.json").stat().st_mtime_ns
    assert shards_of_parquet(tmp_path, iter(())) == first
    assert (first / "manifest.json").stat().st_mtime_ns == made
    assert [e.query for e in read_shards(first)[None]] == [f"{n}{i}" for n in range(2) for i in range(5)]
    pa.parquet.write_table(pa.Table.from_pylist([{"query": "new", "positive": "p"}]), tmp_path / "2.parquet")
    second = shards_of_parquet(tmp_path, read_examples(tmp_path))
    assert second != first
    assert not first.exists()
    assert len(read_shards(second)[None]) == 11


def test_a_loader_over_shards_holds_no_rows_in_memory(tmp_path):
    program = """
        import sys, tracemalloc
        from pyqemb.data.example import Example
        from pyqemb.data.loader import Loader
        from pyqemb.data.shards import read_shards, write_shards
        examples = (Example(f"query {i}", "a document of some length " * 20 + str(i)) for i in range(60_000))
        write_shards(sys.argv[1], examples, rows_per_file=20_000)
        tracemalloc.start()
        loader = Loader({"a": read_shards(sys.argv[1])[None]}, 64, seed=1)
        seen = {e.query for step in range(300) for e in loader.batch(step)}
        assert len(seen) == 300 * 64
        print(tracemalloc.get_traced_memory()[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "shards")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 12e6  # the texts are 32 MB; an order of 60,000 is half a megabyte, the queries seen 2
