"""Rows of every format and compression, and what is refused with its place."""

import bz2
import gzip
import json
import lzma
import math
import resource

import pyarrow as pa
import pytest

from pyqemb.data import rows as module
from pyqemb.data.rows import read_rows, read_text
from pyqemb.errors import DataError

ROWS = [{"a": "eins\u2028zwei\r", "b": "x, y"}, {"a": "\U0001f600", "b": '"q"\nr'}]


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
CSV = 'a,b\r\n"eins\u2028zwei\r","x, y"\r\n\r\n\U0001f600,"""q""\nr"\r\n'
CONTENT = {
    ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS),
    ".json": json.dumps(ROWS, indent=2, ensure_ascii=False),
    ".csv": CSV,
    ".tsv": CSV.replace(",", "\t").replace("x\t", "x,"),
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", CONTENT)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_formats(tmp_path, kind, compression, mark):
    path = tmp_path / f"rows{kind}{compression}"
    path.write_bytes(COMPRESS[compression](mark + CONTENT[kind].encode()))
    assert [row for _, row in read_rows(path)] == ROWS


@pytest.mark.parametrize("compression", [".bz2", ".zst"])
def test_damaged_compression(tmp_path, compression):
    path = tmp_path / f"rows.jsonl{compression}"
    whole = COMPRESS[compression]("".join(f'{{"a": "{i * 7919}"}}\n' for i in range(999)).encode())
    for content in (whole[:-10], whole[: len(whole) // 2], b"plain text"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="damaged or cut short"):
            list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", b"{}", "unknown format; expected .jsonl, .json, .csv, .tsv, .parquet"),
        ("rows.jsonl.lz4", b"{}", "unknown format"),
        ("rows.jsonl", '{"a": 1}'.encode("utf-16"), ":1:1: not UTF-8: the byte-order mark is that of UTF-16"),
        ("rows.json", '[{"a": 1}]'.encode("utf-32"), "UTF-32"),
        ("rows.jsonl", b'{"a": 1, "a": 2}', ":1:1: the key 'a' occurs twice"),
        ("rows.jsonl", b'{}\n{"a": ' + b"9" * 400 + b"}", ":2:1: .* too large"),
        ("rows.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "too large"),
        ("rows.jsonl", b'{"a": 1e999}', "too large"),
        ("rows.jsonl", b'{"a": 1}\r{"a": 2}', ":1:10: not JSON"),
        ("rows.json", b'[{"a": 1}, {"a": 1, "a": 2}]', "rows.json:2:1: the key 'a' occurs twice"),
        ("rows.json", b'[{"a": ' + b"[" * 100_000, "rows.json:1: nested too deeply"),
        ("rows.json", b'[{"a": ' + b"9" * 5000 + b"}]", "rows.json:1:1: .* too large"),
        ("rows.json", b'[{"a": 1} {"a": 2}]', "expected ','"),
        ("rows.json", b'[{"a": 1},', "rows.json:2: not JSON"),
        ("rows.json", b'[{"a": 1}] {}', "text after the end"),
        ("rows.json", b"[1]", "rows.json:1: not JSON: expected an object"),
        (
            "rows.json",
            b'\n{\n "a": 1\n}\n',
            "rows.json:2: the object does not end on its line; expected an array of objects",
        ),
        ("rows.json", b'{"a": [\n1]}\n', "rows.json:1: the object does not end on its line"),
        ("rows.json", b'{"a": 1}\n{"a": \n', "rows.json:2: the object does not end on its line"),
        (
            "rows.csv",
            b"a;b\n1,5;2\n",
            "rows.csv:2: 2 cells where .*; ';' seems to be the delimiter: save the file with",
        ),
        ("rows.csv", b"a,b\n1,2,3\n", "rows.csv:2: 3 cells where the header"),
        ("rows.csv", b"a,a\n", "names a column twice"),
        ("rows.csv", b'a,b\n"1,2\n', "rows.csv:2: not CSV"),
        ("rows.csv", b'a,b\n"1"x,2\n', "rows.csv:2: not CSV"),
        ("rows.csv", b"a\n\xff\n", "rows.csv:2:1: not UTF-8"),
    ],
)
def test_what_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        list(read_rows(tmp_path / name))
    assert error.value.exit_code == 3
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("spaces", [b"", b"\n", b"\n\n", b" \r\n\t\n\n\n", b"\n" * (3 << 20)])
@pytest.mark.parametrize("content", [b'[{"a": 1}]', b'{"a": 1}\n'])
def test_spaces_before_the_first_row(tmp_path, mark, spaces, content):
    (tmp_path / "rows.json").write_bytes(mark + spaces + content)
    assert [row for _, row in read_rows(tmp_path / "rows.json")] == [{"a": 1}]


def test_numbers_and_blanks():
    for text, number in (("1", 1.0), (" 2.5e3\n", 2500.0), ("-0", 0.0), (".5", 0.5), ("inf", math.inf)):
        assert module.number_of(text) == number
    for text in ("1_0", "1_000.5", "\u0661\u0662", "\uff11", "0x10", "1,5", "", "one"):
        assert module.number_of(text) is None
    for text in ("", " \n", "\u200b", "\u200b\ufeff\u2060", "\u00ad \u200d", "\u202a\u202c", "\x00"):
        assert module.is_blank(text)
    for text in ("a", "\u200ba", ".", "\U0001f600", "\u0301", "\ue000"):
        assert not module.is_blank(text)


def test_the_index_of_pandas_has_a_name(tmp_path):
    (tmp_path / "rows.csv").write_text(",a\n0,x\n")
    assert list(read_rows(tmp_path / "rows.csv")) == [(f"{tmp_path}/rows.csv:2", {"column 1": "0", "a": "x"})]


@pytest.mark.parametrize("kind", CONTENT)
def test_a_long_line_is_refused_in_bounded_memory(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(module, "MAX_LINE", 1 << 20)
    path = tmp_path / f"bomb{kind}.gz"
    start = b'[{"a": "' if kind == ".json" else b'a\n"' if kind in (".csv", ".tsv") else b'{"a": "'
    path.write_bytes(gzip.compress(start + b"x" * (300 << 20), compresslevel=1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"longer than 1 MiB|larger than field limit"):
        list(read_rows(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


def test_many_small_objects_of_an_array(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_READ", 64)
    rows = [{"a": "x" * (i % 200), "n": [i, {"m": '[{\\"'}]} for i in range(500)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert [row for _, row in read_rows(tmp_path / "rows.json")] == rows


def test_lines_end_with_line_feeds_alone(tmp_path):
    (tmp_path / "lines.txt").write_bytes("\ufeffeins\r\nz\u2028w\u0085e\x0bi\n\nvier".encode())
    assert [line for _, line in read_text(tmp_path / "lines.txt")] == ["eins", "z\u2028w\u0085e\x0bi", "", "vier"]
