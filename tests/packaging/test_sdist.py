"""The source distribution holds all that building, testing and reading take."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_IN_IT = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")


def test_every_file_of_the_repository_is_in_it(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        str(tmp_path),
        "sdist",
        "--dist-dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    files = [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    assert [name for name in files if not name.startswith(NOT_IN_IT) and name not in packed] == []
