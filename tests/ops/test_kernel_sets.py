"""PYQEMB_KERNELS: which CUDA kernels Hopper gets."""

import subprocess
import sys

import pytest

from pyqemb import _C
from pyqemb.errors import ConfigError
from pyqemb.ops import kernel_sets


@pytest.mark.parametrize(
    ("wanted", "proven", "newest", "why"),
    [
        (None, None, 80, "have not passed their tests on a GPU yet"),
        ("auto", None, 80, "have not passed their tests on a GPU yet"),
        ("auto", "0" * 64, 90, "auto"),
        ("80", "0" * 64, 80, "PYQEMB_KERNELS=80"),
        ("90", None, 90, "PYQEMB_KERNELS=90"),
    ],
)
def test_choice(monkeypatch, wanted, proven, newest, why):
    monkeypatch.delenv("PYQEMB_KERNELS", raising=False)
    if wanted is not None:
        monkeypatch.setenv("PYQEMB_KERNELS", wanted)
    monkeypatch.setattr(kernel_sets, "PROVEN_ON_HOPPER", proven)
    found, reason = kernel_sets.choose()
    assert found == newest
    assert why in reason


def test_the_choice_is_made_before_the_first_call():
    before = _C.set_newest_kernels(80)
    _C.set_newest_kernels(before)
    assert before == kernel_sets.choose()[0]


def test_another_value_is_an_error(monkeypatch):
    monkeypatch.setenv("PYQEMB_KERNELS", "70")
    done = subprocess.run([sys.executable, "-m", "pyqemb", "doctor"], capture_output=True, text=True)
    assert done.stderr == "pyqemb doctor: PYQEMB_KERNELS: expected one of auto, 80, 90, got '70'\n"
    assert done.returncode == ConfigError.exit_code
