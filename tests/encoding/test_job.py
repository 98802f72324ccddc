"""Files in, files out: every form, several processes, kills, other jobs' parts, full disks."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from pyqemb.cli import main
from pyqemb.data.rows import estimate_rows
from pyqemb.encoding import encode_file
from pyqemb.encoding.inputs import read_texts
from pyqemb.errors import ConfigError, DataError, MachineError
from pyqemb.model.embedder import Embedder
from pyqemb.model.quantize import quantize
from pyqemb.testing.tiny import TEXTS, tiny_embedder

ROWS = [f"{text.strip()} {i}".replace("\n", " ") for i in range(4) for text in TEXTS]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    embedder = tiny_embedder()
    embedder.prompts["document"] = "d: "
    return embedder.save_pretrained(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(ROWS)))
    return path


def test_every_input(tmp_path, jsonl):
    wanted = [(f"d{i}", text) for i, text in enumerate(ROWS)]
    assert [tuple(row) for row in read_texts(jsonl)] == wanted
    with gzip.open(tmp_path / "texts.jsonl.gz", "wt") as file:
        file.write(jsonl.read_text())
    assert [tuple(row) for row in read_texts(tmp_path / "texts.jsonl.gz")] == wanted
    table = pa.table({"id": list(range(3)), "body": ["a", "b", "c"], "title": ["T", None, ""]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert [tuple(row) for row in read_texts(tmp_path / "t.parquet", "body")] == [("0", "T a"), ("1", "b"), ("2", "c")]
    (tmp_path / "lines.txt").write_bytes("eins\r\n\nzwei \u2028 drei\nvier".encode())
    assert [row.text for row in read_texts(tmp_path / "lines.txt")] == ["eins", "", "zwei \u2028 drei", "vier"]


def test_lines_and_cells(tmp_path, caplog):
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert [row.text for row in read_texts(tmp_path / "mark.txt")] == ["one", "two"]
    (tmp_path / "t.csv").write_text('id,text\n1,"a, b"\n1,\n')
    assert [tuple(row) for row in read_texts(tmp_path / "t.csv")] == [("1", "a, b"), ("1", "")]
    assert "1 ids occur again (first: '1' at" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", '{"_id": "a\\nb", "text": "x"}', r"t\.jsonl:1: the id 'a\\nb' has a line end"),
        ("t.jsonl", '{"_id": "a\\u2028b", "text": "x"}', "has a line end"),
        ("t.jsonl", '{"_id": 1.5, "text": "x"}', "'_id' must be text or an integer, got 1.5"),
        ("t.jsonl", '{"_id": "a", "text": "x"}\n{"text": "y"}', r"t\.jsonl:2: lacks an id"),
        ("t.csv", "one\ntwo\n", r"t\.csv:2: expected a text under 'text', the row has \['one'\]"),
        ("t.txt", "one\rtwo", r"t\.txt:1: a carriage return"),
        ("t.txt", "\ufeffone".encode("utf-16"), "UTF-16"),
        ("t.md", "one", r"unknown format; expected .*\.txt"),
        ("t", "one", "unknown format"),
    ],
)
def test_inputs_that_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        list(read_texts(tmp_path / name))


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
@pytest.mark.parametrize("precision", ["float32", "int8", "ubinary"])
def test_every_output(model, jsonl, tmp_path, suffix, precision):
    out, seen = tmp_path / f"out{suffix}", []
    done = encode_file(
        model, jsonl, out, dim=20, precision=precision, rows_per_part=7, on_progress=lambda *x: seen.append(x)
    )
    exact = Embedder.from_pretrained(model).encode_document(ROWS, dim=20)
    if suffix == ".parquet":
        table = pq.read_table(out)
        found = np.stack(table["embedding"].to_pylist()).astype(table["embedding"].type.value_type.to_pandas_dtype())
        ids = table["id"].to_pylist()
    else:
        found = np.load(out) if suffix == ".npy" else load_file(out)["embeddings"]
        ids = (tmp_path / f"{out.name}.ids").read_text().split()
    assert ids == [f"d{i}" for i in range(len(ROWS))]
    assert (done.rows, done.dim, done.resumed) == (len(ROWS), found.shape[1], 0)
    assert seen[-1][0] == len(ROWS)
    if precision == "float32":
        assert np.abs(found - exact).max() < 1e-6
    else:
        wanted = quantize(exact, precision)
        assert found.dtype == wanted.dtype
        assert (found.astype(int) - wanted.astype(int) != 0).mean() < 0.01
    assert (tmp_path / f"{out.name}.ranges.npy").exists() == (precision == "int8")
    assert not (tmp_path / f"{out.name}.parts").exists()


def test_sides(model, jsonl, tmp_path):
    embedder = Embedder.from_pretrained(model)
    cases = {
        "document": embedder.encode_document(ROWS), "raw": embedder.encode(ROWS), "query": embedder.encode_query(ROWS),
    }  # fmt: skip
    for side, wanted in cases.items():
        encode_file(model, jsonl, tmp_path / "x.npy", side=side)
        assert np.abs(np.load(tmp_path / "x.npy") - wanted).max() < 1e-6
    encode_file(model, jsonl, tmp_path / "x.npy", side="query", instruction="Find")
    assert np.abs(np.load(tmp_path / "x.npy") - embedder.encode(ROWS, instruction="Find")).max() < 1e-6


def test_what_a_process_cannot_load_is_said(jsonl, tmp_path):
    with pytest.raises(DataError, match="none: no such model folder"):
        encode_file(tmp_path / "none", jsonl, tmp_path / "x.npy", devices=("cpu", "cpu"))


def test_a_process_that_dies_is_said(model, jsonl, tmp_path):
    script = (
        "import os, signal, sys, pyqemb.jobs.executors as w\n"
        "def killed(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "w._work = killed\n"
        "from pyqemb.encoding import encode_file\n"
        "from pyqemb.errors import PyqembError\n"
        "if __name__ == '__main__':\n"
        "    try: encode_file(*sys.argv[1:], devices=('cpu', 'cpu'))\n"
        "    except PyqembError as error: print(error)\n"
    )
    path = tmp_path / "job.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, str(path), str(model), str(jsonl), str(tmp_path / "x.npy")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.startswith("a process died, perhaps out of memory; finished parts are kept"), done.stderr[-1000:]


def test_a_killed_job_goes_on(model, jsonl, tmp_path):
    out = tmp_path / "x.npy"
    slow = (
        "import sys, time; from pyqemb.jobs.parts import VectorPart; real = VectorPart.write\n"
        "def slow(*parts): real(*parts); time.sleep(0.5)\n"
        "VectorPart.write = slow\n"
        "from pyqemb.encoding import encode_file; encode_file(*sys.argv[1:], rows_per_part=5)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, str(model), str(jsonl), str(out)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    third = tmp_path / "x.npy.parts" / "00000002.npy"
    end = time.monotonic() + 60
    while not third.exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    done = encode_file(model, jsonl, out, rows_per_part=5)
    assert done.resumed >= 15
    assert done.rows == len(ROWS)
    assert np.abs(np.load(out) - Embedder.from_pretrained(model).encode_document(ROWS)).max() < 1e-6


def test_parts_of_another_job_are_not_used(model, jsonl, tmp_path, monkeypatch):
    out = tmp_path / "x.npy"
    monkeypatch.setattr(
        "pyqemb.encoding.job._assemble", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(MachineError, match=r"x\.npy: cannot be written: No space left on device"):
        encode_file(model, jsonl, out)
    monkeypatch.undo()
    with pytest.raises(
        ConfigError, match="holds parts of another job \\(dim was None, now 8\\); remove it to start over"
    ):
        encode_file(model, jsonl, out, dim=8)
    assert encode_file(model, jsonl, out).resumed == len(ROWS)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "config_sentence_transformers.json"])
def test_parts_of_a_model_with_other_settings_are_not_used(model, jsonl, tmp_path, monkeypatch, file):
    own, out = shutil.copytree(model, tmp_path / "own"), tmp_path / "x.npy"
    with monkeypatch.context() as patch:
        patch.setattr("pyqemb.encoding.job._assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            encode_file(own, jsonl, out)
    settings = json.loads((own / file).read_text())
    if file == "config.json":
        settings["rms_norm_eps"] = 0.1
    elif file == "tokenizer.json":
        settings["normalizer"] = {"type": "Lowercase"}
    else:
        settings["prompts"]["document"] = "e: "
    (own / file).write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"holds parts of another job \(settings of the model was "):
        encode_file(own, jsonl, out)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_names_that_are_not_utf8(model, tmp_path, monkeypatch, suffix):
    name = os.fsdecode(b"a\xff")
    texts, out = tmp_path / f"{name}.txt", tmp_path / f"{name}{suffix}"
    texts.write_text("\n".join(ROWS))
    with monkeypatch.context() as patch:
        patch.setattr("pyqemb.encoding.job._assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            encode_file(model, texts, out)
    assert encode_file(model, texts, out).resumed == len(ROWS)
    assert out.stat().st_size > len(ROWS) * 32 * 4


def test_half_of_a_surrogate_pair_in_an_instruction(model, jsonl, tmp_path):
    with pytest.raises(DataError, match=r"texts: 'Instruct: a\\udcff.*half of a surrogate pair"):
        encode_file(model, jsonl, tmp_path / "x.npy", side="query", instruction="a\udcff")


@pytest.fixture
def stopped(model, jsonl, tmp_path, monkeypatch):
    """All parts of a job that did not come to join them: (out, its folder of parts, the right vectors)."""
    out = tmp_path / "x.npy"
    with monkeypatch.context() as patch:
        patch.setattr("pyqemb.encoding.job._assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            encode_file(model, jsonl, out, rows_per_part=5)
    return out, tmp_path / "x.npy.parts", Embedder.from_pretrained(model).encode_document(ROWS)


def is_right(out, wanted):
    ids = [f"d{i}" for i in range(len(ROWS))]
    return np.abs(np.load(out) - wanted).max() < 1e-6 and (out.parent / f"{out.name}.ids").read_text().split() == ids


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", [".npy", ".ids", ".json"])
@pytest.mark.parametrize("damage", ["first", "middle", "last", "truncated", "empty", "missing", "of part 2"])
def test_a_damaged_part_is_made_again(model, jsonl, stopped, caplog, suffix, damage):
    out, folder, wanted = stopped
    path = folder / f"00000001{suffix}"
    size = path.stat().st_size
    if damage == "missing":
        path.unlink()
    elif damage == "of part 2":
        path.write_bytes((folder / f"00000002{suffix}").read_bytes())
    elif damage in ("truncated", "empty"):
        os.truncate(path, size - 1 if damage == "truncated" else 0)
    else:
        flip(path, {"first": 0, "middle": size // 2, "last": size - 1}[damage])
    assert encode_file(model, jsonl, out, rows_per_part=5).resumed == len(ROWS) - 5
    assert is_right(out, wanted)
    assert not folder.exists()
    assert f"00000001{suffix}" in caplog.text
    assert "the part is made again" in caplog.text


def test_swapped_parts_are_made_again(model, jsonl, stopped, tmp_path, caplog):
    out, folder, wanted = stopped
    for first in list(folder.glob("00000000.*")):
        second = folder / f"00000001{first.suffix}"
        first.rename(tmp_path / "aside")
        second.rename(first)
        (tmp_path / "aside").rename(second)
    assert encode_file(model, jsonl, out, rows_per_part=5).resumed == len(ROWS) - 10
    assert is_right(out, wanted)
    assert caplog.text.count("belongs to another part") == 2


def test_parts_of_another_output_are_made_again(model, jsonl, stopped, tmp_path):
    out, folder, wanted = stopped
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyqemb.encoding.job._assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            encode_file(model, jsonl, tmp_path / "y.npy", rows_per_part=5, side="raw")
    for path in (tmp_path / "y.npy.parts").glob("00000003.*"):
        path.replace(folder / path.name)
    assert encode_file(model, jsonl, out, rows_per_part=5).resumed == len(ROWS) - 5
    assert is_right(out, wanted)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_damage_before_the_parts_are_joined(model, jsonl, tmp_path, monkeypatch, caplog, precision):
    from pyqemb.encoding import job

    out, real, calls = tmp_path / "x.npy", job._assemble, []

    def damaged(files, *rest):
        calls.append(1)
        if len(calls) == 1:
            flip(files[1].path, -2)
        return real(files, *rest)

    encode_file(model, jsonl, tmp_path / "wanted.npy", rows_per_part=5, precision=precision)
    monkeypatch.setattr(job, "_assemble", damaged)
    encode_file(model, jsonl, out, rows_per_part=5, precision=precision)
    assert len(calls) == 2
    assert "00000001.npy: damaged" in caplog.text
    assert is_right(out, np.load(tmp_path / "wanted.npy").astype(int if precision == "int8" else float))


def test_a_damaged_manifest_is_refused(model, jsonl, stopped):
    out, folder, _ = stopped
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()
    for content in (whole.replace(b'"dim":null', b'"dim":8'), whole[:-2], b"", b"[]", b"\xff", b"[" * 10_000):
        manifest.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.npy\.parts/manifest\.json.*; remove .*x\.npy\.parts to start over"):
            encode_file(model, jsonl, out, rows_per_part=5)
    manifest.write_bytes(whole)
    assert encode_file(model, jsonl, out, rows_per_part=5).resumed == len(ROWS)


@pytest.mark.promise("R9", "two encode jobs with one output")
def test_two_jobs_with_one_output(model, jsonl, tmp_path, capsys):
    out = tmp_path / "x.npy"
    waiting = (
        "import sys, time; from pyqemb.jobs.parts import VectorPart\n"
        "VectorPart.write = lambda *_: time.sleep(600)\n"
        "from pyqemb.encoding import encode_file; encode_file(*sys.argv[1:])"
    )
    first = subprocess.Popen([sys.executable, "-c", waiting, str(model), str(jsonl), str(out)])
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "x.npy.parts" / "manifest.json").exists():
            assert first.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        with pytest.raises(ConfigError, match=rf"x\.npy\.parts: another encode is running here: pid {first.pid} on"):
            encode_file(model, jsonl, out)
        assert main(["encode", str(model), str(jsonl), "--out", str(out)]) == 2
        assert encode_file(model, jsonl, tmp_path / "y.npy").rows == len(ROWS)
    finally:
        first.kill()
        first.wait()
    assert encode_file(model, jsonl, out).rows == len(ROWS)
    assert not list(tmp_path.glob("*.parts"))
    assert not list(tmp_path.glob(".*"))


def test_what_is_refused(model, jsonl, tmp_path):
    out = tmp_path / "x.npy"
    for options, message in (
        ({"precision": "int4"}, "precision must be 'float32', 'int8', "),
        ({"side": "both"}, "side must be 'query', 'document' or 'raw'"),
        ({"instruction": "Find"}, "instruction: is for side 'query'"),
        ({"rows_per_part": 0}, "rows_per_part must be at least 1"),
        ({"dim": 99}, "dim must lie in 1..32"),
    ):
        with pytest.raises(ConfigError, match=message):
            encode_file(model, jsonl, out, **options)
    with pytest.raises(ConfigError, match=r"x\.csv: expected a name that ends with \.npy, \.safetensors, \.parquet"):
        encode_file(model, jsonl, tmp_path / "x.csv")
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        encode_file(model, tmp_path / "none.jsonl", tmp_path / "y.npy")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe\.jsonl: is a pipe or a device; expected a file"):
        encode_file(model, tmp_path / "pipe.jsonl", tmp_path / "y.npy")
    with pytest.raises(DataError, match="is a folder; expected a file"):
        encode_file(model, tmp_path, tmp_path / "y.npy")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="holds no texts"):
        encode_file(model, tmp_path / "empty.txt", tmp_path / "z.npy")
    jsonl.write_text('{"text": 3}\n')
    with pytest.raises(DataError, match=r"texts\.jsonl:1: expected a text under 'text'"):
        encode_file(model, jsonl, tmp_path / "w.npy")


def test_command_line(model, jsonl, tmp_path, capsys):
    out = tmp_path / "v.safetensors"
    assert main(["encode", str(model), str(jsonl), "--out", str(out), "--instruction", "Find", "--dim", "8"]) == 0
    assert f"{len(ROWS)} texts, vectors of 8 features" in capsys.readouterr().out
    assert (
        np.abs(
            load_file(out)["embeddings"] - Embedder.from_pretrained(model).encode(ROWS, instruction="Find", dim=8)
        ).max()
        < 1e-6
    )
    assert main(["encode", str(model), str(jsonl), "--out", str(out), "--processes", "0"]) == 2


def test_ids_and_ranges_of_an_earlier_output_do_not_stay(tmp_path):
    model = tiny_embedder().save_pretrained(tmp_path / "model")
    (tmp_path / "ids.jsonl").write_text('{"id": "a", "text": "one"}\n{"id": "b", "text": "two"}\n')
    (tmp_path / "lines.txt").write_text("x\ny\nz\n")
    out = tmp_path / "out.npy"
    encode_file(str(model), tmp_path / "ids.jsonl", out, precision="int8")
    assert (tmp_path / "out.npy.ids").exists()
    assert (tmp_path / "out.npy.ranges.npy").exists()
    encode_file(str(model), tmp_path / "lines.txt", out)
    assert len(np.load(out)) == 3
    assert not (tmp_path / "out.npy.ids").exists()
    assert not (tmp_path / "out.npy.ranges.npy").exists()


def test_estimates_of_rows(tmp_path):
    lines = "".join(json.dumps({"text": f"{i} " + "x" * (i % 90)}) + "\n" for i in range(40_000))
    (tmp_path / "t.jsonl").write_text(lines)
    count, is_exact = estimate_rows(tmp_path / "t.jsonl")
    assert abs(count - 40_000) < 400
    assert not is_exact
    (tmp_path / "t.txt").write_text("a\nb")
    assert estimate_rows(tmp_path / "t.txt") == (2, True)
    (tmp_path / "t.csv").write_text("id,text\n1,a\n")
    assert estimate_rows(tmp_path / "t.csv") == (1, False)
    pq.write_table(pa.table({"text": ["a"] * 7}), tmp_path / "t.parquet")
    assert estimate_rows(tmp_path / "t.parquet") == (7, True)
    (tmp_path / "long.txt").write_text("x" * (2 << 20))
    for name in ("t.jsonl.gz", "t.json", "long.txt"):
        (tmp_path / name).touch()
        assert estimate_rows(tmp_path / name) is None
