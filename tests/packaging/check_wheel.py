"""Installs a wheel in a fresh environment without a compiler and uses it: doctor, a training run, encoding.

    python tests/packaging/check_wheel.py WHEEL [TORCH ...]

TORCH: versions of torch to test with, an environment for each (default: the one of constraints.txt). Prints the size
and the platform of the wheel, and what it needs of the system.
"""

import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
USE = """
import json, pathlib, pyqemb
from pyqemb.testing.tiny import write_tiny_folder
write_tiny_folder("base")
rows = [{"query": f"query {i}", "positive": f"document {i * i}"} for i in range(16)]
pathlib.Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
config = pyqemb.stage2(
    model={"base": "base"}, data=[{"path": "pairs.jsonl"}], train={"global_batch_size": 8, "steps": 2},
    save={"dir": "run"},
)
folder = pyqemb.train(config).folder
print("vectors", pyqemb.Embedder.from_pretrained(folder).encode(["a text"]).shape)
"""


def check(wheel: Path, torch: str, folder: Path) -> None:
    """Raises CalledProcessError where a command fails."""
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    environment = {
        "PATH": str(python.parent), "HOME": str(folder), "CC": "/no/compiler", "CXX": "/no/compiler",
        **{name: value for name, value in os.environ.items() if name.startswith("PIP_")},
    }  # fmt: skip

    def run(*words: str) -> None:
        subprocess.run([str(python), *words], cwd=folder, env=environment, check=True)

    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:")
    run(*pip, f"torch=={torch}")
    run(*pip, str(wheel.resolve()), f"torch=={torch}")
    run("-m", "pyqemb", "doctor")
    run("-c", USE)


def main(wheel: str, *versions: str) -> None:
    """Check a wheel with each version of torch."""
    path = Path(wheel)
    with zipfile.ZipFile(path) as archive:
        libraries = [each for each in archive.infolist() if ".so" in each.filename]
    megabytes = path.stat().st_size / 1e6
    print(f"{path.name}: {megabytes:.1f} MB", flush=True)
    if megabytes >= 100:  # what PyPI takes
        sys.exit(f"{path.name} has {megabytes:.1f} MB; the limit is 100 MB")
    for each in libraries:
        print(f"  {each.filename}: {each.file_size / 2**20:.1f} MiB", flush=True)
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    for torch in versions or (pinned[1],):
        with tempfile.TemporaryDirectory() as folder:
            check(path, torch, Path(folder))
        print(f"torch {torch}: installed without a compiler, trained, encoded", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
