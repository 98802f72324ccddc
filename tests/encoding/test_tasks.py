"""Encode jobs of several tasks: the bytes of one process, whoever makes the parts, and what is refused."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import pyqemb
from pyqemb.cli import main
from pyqemb.data.files import locked
from pyqemb.data.npy import npy
from pyqemb.data.sealed import seal
from pyqemb.encoding import encode_file
from pyqemb.errors import ConfigError, DataError, MachineError
from pyqemb.jobs.folder import digest_of
from pyqemb.jobs.tasks import Task
from pyqemb.testing.tiny import TEXTS, tiny_embedder

ROWS = [f"{text.strip()} {i}".replace("\n", " ") for i in range(5) for text in TEXTS]
THREADS = max((os.cpu_count() or 1) // 2, 1)  # of each of two processes; torch's products depend on their number
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
SLOW = """
import sys, time
from pyqemb.jobs.parts import VectorPart
real = VectorPart.write
def slow(*part):
    real(*part)
    print(part[0].path.stem, flush=True)
    time.sleep(600)
VectorPart.write = slow
from pyqemb.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(threads, tmp_path_factory):
    """A model, texts, and the outputs of one process."""
    folder = tmp_path_factory.mktemp("place")
    tiny_embedder().save_pretrained(folder / "m")
    rows = [json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(ROWS)]
    (folder / "texts.jsonl").write_text("".join(rows))
    for precision, name in (("float32", "x.npy"), ("int8", "x.safetensors"), ("float32", "x.parquet")):
        encode_file(folder / "m", folder / "texts.jsonl", folder / name, rows_per_part=4, precision=precision)
    return folder


@pytest.fixture
def encode(place, tmp_path):
    def encode(name="x.npy", **options):
        options = {"rows_per_part": 4, "precision": "int8" if name.endswith(".safetensors") else "float32", **options}
        return encode_file(place / "m", place / "texts.jsonl", tmp_path / name, **options)

    return encode


def outputs(folder, name):
    return {path.name: path.read_bytes() for path in folder.glob(f"{name}*") if path.is_file()}


def command(place, out, *options):
    job = ["encode", str(place / "m"), str(place / "texts.jsonl"), "--out", str(out), "--rows-per-part", "4"]
    return [*job, "--quiet", *options]


@pytest.fixture
def slow_task(place, tmp_path):
    """Starts a command line that stops after its first part, until it is killed."""
    started = []

    def start(*options, out=tmp_path / "x.npy"):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *command(place, out, *options)],
            stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline().strip().isdigit()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("name", ["x.npy", "x.safetensors", "x.parquet"])
def test_tasks_in_any_order_give_the_bytes_of_one_process(encode, place, tmp_path, name):
    order = random.Random(name).sample(range(3), 3)
    done = [encode(name, tasks=3, task=task) for task in order]
    assert sum(each.rows for each in done) == len(ROWS)
    assert {each.out for each in done} == {tmp_path / f"{name}.parts"}
    assert not (tmp_path / name).exists()
    found = pyqemb.finish(tmp_path / name)
    assert (found.out, found.rows, found.dim, found.resumed) == (tmp_path / name, len(ROWS), 32, len(ROWS))
    assert outputs(tmp_path, name) == outputs(place, name)
    assert not list(tmp_path.glob("*.parts"))
    assert not list(tmp_path.glob(".*"))


def test_two_processes_give_the_bytes_of_one(encode, place, tmp_path):
    assert encode(devices=("cpu", "cpu")).rows == len(ROWS)
    assert outputs(tmp_path, "x.npy") == outputs(place, "x.npy")


@pytest.mark.promise("R1", "an encode job of 3 tasks, one of them killed and run again")
def test_a_task_that_is_killed(encode, place, tmp_path, slow_task, capsys):
    killed = slow_task("--tasks", "3", "--task", "1")
    encode(tasks=3, task=2)  # while it runs
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    encode(tasks=3, task=0)
    assert main(["finish", str(tmp_path / "x.npy")]) == 3
    count = -(-len(ROWS) // 4)
    missing = list(range(1, count, 3))[1:]
    line = capsys.readouterr().err
    assert f"{len(missing)} of {count} parts are missing or damaged: {', '.join(map(str, missing))}; run task 1" in line
    assert line.count("\n") == 1
    assert not (tmp_path / "x.npy").exists()
    assert main(command(place, tmp_path / "x.npy", "--tasks", "3", "--task", "1")) == 0
    rows = sum(len(ROWS[4 * part : 4 * part + 4]) for part in [1, *missing])
    said = f"task 1 of 3: {rows} texts (4 of them from an earlier run); when all tasks are done, run pyqemb finish"
    assert said in capsys.readouterr().out
    assert main(["finish", str(tmp_path / "x.npy")]) == 0
    assert f"{len(ROWS)} texts, vectors of 32 features, written to" in capsys.readouterr().out
    assert outputs(tmp_path, "x.npy") == outputs(place, "x.npy")


@pytest.mark.deep
def test_tasks_at_the_same_time(place, tmp_path):
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "pyqemb", *command(place, tmp_path / "x.npy", "--tasks", "2", "--task", str(task))],
            env=ENVIRONMENT,
        )
        for task in range(2)
    ]
    assert [task.wait(timeout=120) for task in tasks] == [0, 0]
    pyqemb.finish(tmp_path / "x.npy")
    assert outputs(tmp_path, "x.npy") == outputs(place, "x.npy")


@pytest.mark.promise("R9", "tasks of an encode job beside one with the same number, another count, or none")
def test_tasks_that_collide(encode, place, tmp_path, capsys):
    encode(tasks=3, task=2)
    with locked(tmp_path / "x.npy.parts", "encode", Task(1, 3).member()):
        for options in (dict(tasks=3, task=1), dict(tasks=2, task=0), {}):
            with pytest.raises(
                ConfigError, match=f"another encode is running here: task-1 of tasks-3, pid {os.getpid()} "
            ):
                encode(**options)
        with pytest.raises(ConfigError, match="another job is running here: task-1 of tasks-3"):
            pyqemb.finish(tmp_path / "x.npy")
        assert main(command(place, tmp_path / "x.npy", "--tasks", "3", "--task", "1")) == 2
        assert capsys.readouterr().err.count("\n") == 1
        encode(tasks=3, task=0)
    assert encode(tasks=3, task=1).resumed == 0
    with locked(tmp_path / "x.npy.parts", "encode"), pytest.raises(ConfigError, match="another encode is running here"):
        encode(tasks=3, task=1)
    pyqemb.finish(tmp_path / "x.npy")
    assert outputs(tmp_path, "x.npy") == outputs(place, "x.npy")


def test_one_process_goes_on_from_tasks_and_tasks_from_one_process(encode, place, tmp_path):
    encode(tasks=3, task=1)
    done = encode()
    assert 0 < done.resumed < done.rows
    assert outputs(tmp_path, "x.npy") == outputs(place, "x.npy")
    (tmp_path / "x.npy").unlink()

    def stop(rows, size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(on_progress=stop)
    with pytest.raises(ConfigError, match=r"x\.npy\.parts: holds no finished work of tasks"):
        pyqemb.finish(tmp_path / "x.npy")
    assert [encode(tasks=2, task=task).resumed for task in range(2)] == [4, 4]
    encode(tasks=5, task=3)  # nothing is left for another number of tasks
    pyqemb.finish(tmp_path / "x.npy")
    assert outputs(tmp_path, "x.npy") == outputs(place, "x.npy")


def test_more_tasks_than_parts(encode, place, tmp_path):
    done = encode(tasks=100, task=99)
    assert (done.rows, done.dim) == (0, 0)
    assert main(command(place, tmp_path / "x.npy", "--tasks", "100", "--task", "98")) == 0
    count = -(-len(ROWS) // 4)
    with pytest.raises(
        DataError, match=f"{count} of {count} parts are missing or damaged: 0-{count - 1}; run tasks 0-"
    ):
        pyqemb.finish(tmp_path / "x.npy")


def test_parts_of_another_job(encode, place, tmp_path):
    encode(tasks=2, task=0)
    for options, words in (
        (dict(dim=8), "dim was None, now 8"),
        (dict(rows_per_part=5), "rows_per_part was 4, now 5"),
        (dict(side="raw"), "side was 'document', now 'raw'"),
        (dict(precision="int8"), "another task has precision 'float32', this one 'int8'"),
    ):
        with pytest.raises(ConfigError, match=words):
            encode(tasks=2, task=1, **options)
    other = shutil.copy(place / "texts.jsonl", tmp_path / "other.jsonl")
    with pytest.raises(ConfigError, match=r"x\.npy\.parts: holds parts of another job \(input was "):
        encode_file(place / "m", other, tmp_path / "x.npy", rows_per_part=4, tasks=2, task=1)
    model = shutil.copytree(place / "m", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"holds parts of another job \(model was "):
        encode_file(model, place / "texts.jsonl", tmp_path / "x.npy", rows_per_part=4, tasks=2, task=1)
    encode(tasks=2, task=1)
    pyqemb.finish(tmp_path / "x.npy")
    assert outputs(tmp_path, "x.npy") == outputs(place, "x.npy")


def test_an_input_that_changes_before_the_end(place, tmp_path):
    texts, out = tmp_path / "own.txt", tmp_path / "x.npy"
    texts.write_text("one\ntwo\nthree\n")
    encode_file(place / "m", texts, out, rows_per_part=2, tasks=1, task=0)
    texts.write_text("one\ntwo\nfour!\n")
    with pytest.raises(DataError, match=r"own\.txt: has changed since its parts in .*x\.npy\.parts were begun"):
        pyqemb.finish(out)
    texts.unlink()
    with pytest.raises(DataError, match=r"own\.txt: no such file; it is the input of .*x\.npy\.parts"):
        pyqemb.finish(out)
    assert len(list((tmp_path / "x.npy.parts").glob("*.npy"))) == 2


def test_damaged_files(encode, place, tmp_path, caplog):
    for task in range(2):
        encode(tasks=2, task=task)
    folder, out = tmp_path / "x.npy.parts", tmp_path / "x.npy"
    content = (folder / "00000003.npy").read_bytes()
    (folder / "00000003.npy").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match="parts are missing or damaged: 3; run task 1 of 2 again"):
        pyqemb.finish(out)
    assert "00000003.npy: damaged" in caplog.text
    encode(tasks=2, task=1)
    for name in ("manifest.json", "output.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-3])
        with pytest.raises(DataError, match=rf"{name}.*; remove .*x\.npy\.parts to start over"):
            pyqemb.finish(out)
        (folder / name).write_bytes(content)
    whole = (folder / "manifest.json").read_bytes()
    facts = {key: value for key, value in json.loads(whole).items() if key != "sha256"}
    (folder / "manifest.json").write_bytes(seal({**facts, "dim": 8}))
    with pytest.raises(DataError, match=r"output\.json: belongs to another job than the parts"):
        pyqemb.finish(out)
    (folder / "manifest.json").write_bytes(whole)
    pyqemb.finish(out)
    assert outputs(tmp_path, "x.npy") == outputs(place, "x.npy")


@pytest.mark.parametrize(
    ("facts", "settings"),
    [
        ({"rows_per_part": 0}, {}), ({"rows_per_part": True}, {}), ({"rows_per_part": "4"}, {}), ({"input": None}, {}),
        ({"field": 3}, {}), ({}, {"precision": "int4"}), ({}, {"precision": []}), ({}, {"precision": None}),
    ],
)  # fmt: skip
def test_manifests_of_another_version(encode, tmp_path, facts, settings):
    encode(tasks=1, task=0)
    folder = tmp_path / "x.npy.parts"
    found = json.loads((folder / "manifest.json").read_bytes())
    del found["sha256"]
    (folder / "manifest.json").write_bytes(seal({**found, **facts}))
    output = {"format": 1, "kind": "encode", "job": digest_of({**found, **facts}),
              "settings": {"precision": "float32", **settings}}  # fmt: skip
    (folder / "output.json").write_bytes(seal(output))
    with pytest.raises(DataError, match=r"x\.npy\.parts: its manifest is of another version of pyqemb, or damaged"):
        pyqemb.finish(tmp_path / "x.npy")
    (folder / "output.json").write_bytes(seal({**output, "kind": "bake"}))
    with pytest.raises(DataError, match="parts of an unknown kind of job, 'bake'"):
        pyqemb.finish(tmp_path / "x.npy")


def test_what_is_refused(encode, place, tmp_path, capsys):
    for options, words in (
        (dict(tasks=3), "tasks and task belong together"),
        (dict(task=0), "tasks and task belong together"),
        (dict(tasks=3, task=3), "task must lie in 0..2 for 3 tasks, got 3"),
    ):
        with pytest.raises(ConfigError, match=words):
            encode(**options)
    assert main(command(place, tmp_path / "x.npy", "--tasks", "auto")) == 2
    assert "--tasks auto: found neither" in capsys.readouterr().err
    for name in ("x.npy", "x.csv"):
        with pytest.raises(DataError, match=rf"{name}\.parts: no such folder of parts$"):
            pyqemb.finish(tmp_path / name)
    encode()
    with pytest.raises(
        DataError, match=r"no such folder of parts; .*x\.npy exists, so the job may be finished already"
    ):
        pyqemb.finish(tmp_path / "x.npy")
    (tmp_path / "a\nb.txt").write_text("one\n")
    with pytest.raises(ConfigError, match="tasks need an input whose name can be printed"):
        encode_file(place / "m", tmp_path / "a\nb.txt", tmp_path / "x.npy", tasks=1, task=0)
    assert not list(tmp_path.glob("*.parts"))


def test_a_task_refuses_an_output_that_cannot_be_written(place, tmp_path):
    (tmp_path / "y.npy").mkdir()
    with pytest.raises(MachineError, match=r"y\.npy: cannot be written: Is a directory"):
        encode_file(place / "m", place / "texts.jsonl", tmp_path / "y.npy", tasks=2, task=0)


def test_parts_of_version_0_2(encode, place, tmp_path):
    """The files as that version wrote them: the job continues from them."""
    out, folder = tmp_path / "x.npy", tmp_path / "x.npy.parts"
    encode(tasks=1, task=0)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    names = ["bytes", "dim", "dtype", "field", "input", "instruction", "max_length", "model", "modified",
             "rows_per_part", "settings of the model", "sha256", "side", "weights"]  # fmt: skip
    assert sorted(manifest) == names
    texts = hashlib.sha256(json.dumps([[f"d{i}", ROWS[i]] for i in range(4)]).encode()).hexdigest()
    job = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    vectors = b"".join(npy(np.load(place / "x.npy")[:4]))
    ids = b"".join(b'"d%d"\n' % i for i in range(4))
    digests = {suffix: hashlib.sha256(content).hexdigest() for suffix, content in ((".npy", vectors), (".ids", ids))}
    facts = {"format": 1, "job": job, "part": "00000000", "texts": texts, "files": digests}
    for path in folder.iterdir():
        if path.name != "manifest.json":
            path.unlink()
    (folder / "00000000.npy").write_bytes(vectors)
    (folder / "00000000.ids").write_bytes(ids)
    (folder / "00000000.json").write_bytes(seal(facts))
    (folder / ".lock").write_text("pid 1 on machine\n")
    assert encode().resumed == 4
    assert outputs(tmp_path, "x.npy") == outputs(place, "x.npy")
    assert out.exists()
