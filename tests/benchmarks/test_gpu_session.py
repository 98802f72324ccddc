"""`make gpu-session` on a machine without a GPU: every step says that it is skipped, and each command could start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_session.sh"


def run(*arguments):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    return subprocess.run([SCRIPT, *map(str, arguments)], capture_output=True, text=True, env=environment)


def steps():
    return [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("step ")]


def test_every_step_is_skipped_visibly(tmp_path):
    done = run(tmp_path / "out")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert lines[1:-1] == [f"{step}: skipped: torch finds no CUDA device" for step in steps()]
    assert lines[0].startswith("20")
    assert lines[-1].endswith(" 0 failed")


def test_arguments(tmp_path):
    assert "usage: gpu_session.sh OUT" in run().stderr
    done = run(tmp_path / "out", "--dry")
    assert done.returncode == 2
    assert done.stderr == "gpu_session.sh: --dry is not known; expected --dry-run or --until SECONDS\n"


@pytest.mark.deep
def test_every_command_could_start(tmp_path):
    done = run(tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("skipped (dry run)") == len(steps())
    for log in (tmp_path / "out").glob("*.log"):
        assert "error" not in log.read_text().lower().replace("error_", ""), log.read_text()[-2000:]
