"""Each bug of planted_bugs.py is seen by the tests of its kernel."""

import importlib.util
import platform
import shutil
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("planted_bugs", Path(__file__).with_name("planted_bugs.py"))
planted_bugs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(planted_bugs)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the emulator of CUDA runs on x86-64"),
    pytest.mark.skipif(not shutil.which(planted_bugs.COMPILER), reason="no C++ compiler"),
]
SOME = list({bug.file: bug for bug in reversed(planted_bugs.BUGS)}.values())[::4]


@pytest.mark.parametrize(
    "bugs",
    [
        pytest.param(SOME, id="some"),
        pytest.param(planted_bugs.BUGS, id="all", marks=pytest.mark.deep),
    ],
)
def test_every_planted_bug_is_caught(bugs):
    assert len(planted_bugs.BUGS) >= 40
    missed = [f"{bug.file}: {bug.why}" for bug, complaint in planted_bugs.run_all(bugs).items() if not complaint]
    assert not missed
