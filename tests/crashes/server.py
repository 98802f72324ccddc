"""Starts fork_server.py and asks it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def build_shim(folder: Path) -> Path | None:
    """The compiled shim.c; None if it cannot be compiled here."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        return None
    library = folder / "shim.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "shim.c", "-ldl", "-lpthread"], check=True
    )
    return library


class ForkServer:
    """Context with a running fork server; `root` has another pyqemb."""

    def __init__(self, shim: Path, root: Path | None = None):
        self._scratch = tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
        path = str(root or HERE.parents[1])
        self._process = subprocess.Popen(
            [sys.executable, HERE / "fork_server.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )  # fmt: skip
        self._asked = 0

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
        self._scratch.cleanup()

    def ask(self, **request: object) -> dict:
        """The report of a request (see fork_server.py)."""
        self._asked += 1
        request["place"] = f"{self._scratch.name}/{self._asked}"
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the fork server ended with {self._process.wait()}"
        return json.loads(line)
