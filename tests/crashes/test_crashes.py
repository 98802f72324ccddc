"""Kills before, and errors of, the system calls of jobs that write: the old result or the new one is left, never a
mixture; the next run goes on and ends with the same bytes; errors are one line.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EVERY = {"train": 19, "merge": 11, "encode": 13, "curate": 5, "mine": 5}  # in `make test`


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler for the library that lets system calls fail")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "shim.c", "-ldl"], check=True)
    return library


def crash(job, every, shim, folder):
    done = subprocess.run(
        [sys.executable, HERE / "driver.py", job, folder, str(every)], capture_output=True, text=True,
        env={**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("job", "every"),
    [*EVERY.items(), *(pytest.param(job, 1, marks=pytest.mark.deep, id=f"{job}-all") for job in EVERY)],
)
def test_every_call_may_be_the_last(shim, tmp_path, record_property, job, every):
    report = crash(job, every, shim, tmp_path)
    assert not report["wrong"], "\n".join(report["wrong"])
    assert report["statuses"]["-9"] == -(-report["calls"] // every)
    record_property("R2", f"{job}: kill, ENOSPC and EIO at {report['children'] // 3} of {report['calls']} calls")
