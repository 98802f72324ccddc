"""Long jobs keep their memory, descriptors and threads, and lose nothing. Speed is recorded, and decides nothing.

PYQEMB_SOAK_SECONDS: how long the server is asked in `make test-deep` (default: 3600).
"""

import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from pyqemb.encoding import encode_file
from pyqemb.testing.tiny import write_tiny_folder

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("soak_measure", HERE / "measure.py")
measure = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measure)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
MB, DESCRIPTORS, THREADS = 1, 2, 3  # columns of a sample; the first is the step or the time
PER_1000_STEPS = 1.0  # MB
RESOLUTION = 1.0  # MB: what the allocator's own pools may add in a short run


def drive(*words):
    done = subprocess.run(
        [sys.executable, HERE / "driver.py", *map(str, words)], capture_output=True, text=True, env=ONE_THREAD
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def steady(samples, allowed, connections=0):
    """What grew; nothing, if all is well. `allowed`: MB between the first sample and the last; `connections`: those
    that a client keeps open.
    """
    kept = measure.after_warm_up(samples)
    line = measure.slope([row[0] for row in kept], [row[MB] for row in kept]) * (kept[-1][0] - kept[0][0])
    grown = {"MB": round(line, 2)} if line > allowed else {}
    for name, column, more in (("descriptors", DESCRIPTORS, connections), ("threads", THREADS, 0)):
        if measure.growth(kept, column) > more:
            grown[name] = measure.growth(kept, column)
    return grown


def trained(samples):
    kept = measure.after_warm_up(samples)
    return steady(samples, max(PER_1000_STEPS * (kept[-1][0] - kept[0][0]) / 1000, RESOLUTION))


@pytest.mark.parametrize("steps", [500, pytest.param(10_000, marks=pytest.mark.deep)])
def test_training(tmp_path, record_property, steps):
    report = drive("train", tmp_path, steps)
    samples, times = report["samples"], report["times"]
    assert len(times) == steps
    assert not trained(samples)
    assert len(report["left"]) == 3, report["left"]
    kept = measure.after_warm_up(samples)
    per_1000 = measure.slope([row[0] for row in kept], [row[MB] for row in kept]) * 1000
    tenth = steps // 10
    drift = statistics.median(times[-tenth:]) / statistics.median(times[3 * tenth : 4 * tenth]) - 1
    record_property("R23", f"{steps:,} steps, 20 saves: {per_1000:+.2f} MB per 1,000 steps, step time {drift:+.0%}")


@pytest.mark.parametrize(
    ("column", "per_step", "name"), [(MB, 0.004, "MB"), (DESCRIPTORS, 0.02, "descriptors"), (THREADS, 0.02, "threads")]
)
def test_leaks_are_seen(column, per_step, name):
    """In made-up samples, with the noise of saves."""
    samples = [[step, 250.0 + step % 7 / 10, 8 + (step % 25 < 3), 4 + (step % 25 < 3)] for step in range(0, 500, 2)]
    assert not trained(samples)
    for row in samples:
        row[column] += int(row[0] * per_step) if column != MB else row[0] * per_step
    assert list(trained(samples)) == [name]


@pytest.mark.deep
@pytest.mark.parametrize(("leak", "name"), [("memory", "MB"), ("descriptor", "descriptors"), ("thread", "threads")])
def test_planted_leaks_are_found(tmp_path, leak, name):
    assert name in trained(drive("train", tmp_path, 500, leak)["samples"])


@pytest.mark.parametrize("texts", [20_000, pytest.param(1_000_000, marks=pytest.mark.deep)])
def test_encoding(tmp_path, record_property, texts):
    rng, model = random.Random(0), write_tiny_folder(tmp_path / "model")
    words = ["gravity", "force", "print", "document", "capital", "bodies"]
    with (tmp_path / "texts.txt").open("w") as file:
        file.writelines(f"{rng.choice(words)} {number}\n" for number in range(texts))
    command = [
        "encode",
        model,
        tmp_path / "texts.txt",
        "-o",
        tmp_path / "all.npy",
        "--quiet",
        "--rows-per-part",
        "1024",
    ]
    samples, pause = [], 0.02 if texts < 100_000 else 1.0
    with subprocess.Popen([sys.executable, "-m", "pyqemb", *map(str, command)], env=ONE_THREAD) as job:
        while job.poll() is None and not list(tmp_path.glob("all.npy.parts/*.npy")):
            time.sleep(0.02)  # it starts
        start = time.perf_counter()
        while job.poll() is None:
            with suppress(OSError):  # it may end while we read
                samples.append([time.perf_counter() - start, *measure.sample(job.pid)])
            time.sleep(pause)
    assert job.returncode == 0
    vectors = np.load(tmp_path / "all.npy", mmap_mode="r")
    assert len(vectors) == texts
    assert not steady(samples, 8.0)  # a part has 1,024 rows: under 1 MB
    lines = (tmp_path / "texts.txt").read_text().splitlines()
    chosen = sorted(rng.sample(range(texts), 200))
    (tmp_path / "few.txt").write_text("".join(f"{lines[at]}\n" for at in chosen))
    encode_file(model, tmp_path / "few.txt", tmp_path / "few.npy")
    assert np.abs(vectors[chosen] - np.load(tmp_path / "few.npy")).max() < 1e-6
    peak, seconds = max(row[MB] for row in samples), samples[-1][0]
    record_property("R23", f"encode of {texts:,} texts: {peak:.0f} MB at most, {texts / seconds:,.0f} texts/s")


@pytest.mark.parametrize(("seconds", "rate"), [(20, 100), pytest.param(None, 1e9, marks=pytest.mark.deep, id="deep")])
def test_a_server_that_fails_one_request_in_ten(tmp_path, record_property, seconds, rate):
    pytest.importorskip("openai", reason="openai is not installed (pip install 'pyqemb[data]')")
    seconds = seconds or float(os.environ.get("PYQEMB_SOAK_SECONDS", "3600"))
    with subprocess.Popen(
        [sys.executable, HERE / "server.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ONE_THREAD
    ) as server:
        url = server.stdout.readline().strip()
        report = drive("ask", tmp_path, url, seconds, rate)
        said, _ = server.communicate()
    served = json.loads(said)
    # Each question got its own answer (driver.py); each was answered once, and none was skipped.
    assert served["again"] == served["missing"] == []
    assert served["numbers"] == report["asked"] == report["stored"] >= 150
    assert served["counts"].keys() >= {"500", "429", "cut", "not json", "slow", "cut body", "silent", "ok"}
    assert not steady(report["samples"], 4.0, connections=16)
    # Closed, the client holds no more than before; the store has two more files open.
    assert report["after"][DESCRIPTORS - 1] <= report["before"][DESCRIPTORS - 1] + 2
    failed = sum(report["retries"].values())
    record_property(
        "R23",
        f"{report['given']:,} questions to a server in {seconds:.0f} s, {failed:,} tries failed",
    )
