"""The names of the package itself."""

import pickle
import subprocess
import sys

import pytest

import pyqemb
from pyqemb.errors import ConfigError, MachineError, RankError


def test_every_public_name_is_listed_and_loads():
    assert set(pyqemb.__all__) <= set(dir(pyqemb))
    for name in pyqemb.__all__:
        assert getattr(pyqemb, name) is not None


def test_help_and_completion_show_the_public_names():
    """In a new process: no name is loaded before."""
    code = (
        "import pydoc, rlcompleter, pyqemb; names = set(dir(pyqemb)); print('torch' in __import__('sys').modules)\n"
        "assert {'train', 'Embedder', 'stage1', 'TrainConfig'} <= names\n"
        "assert rlcompleter.Completer({'pyqemb': pyqemb}).complete('pyqemb.mer', 0).startswith('pyqemb.merge')\n"
        "text = pydoc.plain(pydoc.render_doc(pyqemb))\n"
        "missing = [name for name in pyqemb.__all__ if name not in text]\n"
        "assert not missing, missing\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "False"


def test_configurations_come_from_the_package():
    from pyqemb import TrainConfig, stage1, stage2

    sections = {"model": {"base": "base"}, "data": [{"path": "pairs.jsonl"}]}
    assert isinstance(stage1(**sections), TrainConfig)
    assert isinstance(stage2(**sections), TrainConfig)


@pytest.mark.parametrize("kind", [ConfigError, MachineError, RankError])
def test_errors_are_one_line(kind):
    """What a file or a server sends may be in them."""
    error = kind("run.toml: unknown key 'a\nb\x1b[31m é'")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "run.toml: unknown key 'a\\nb\\x1b[31m é'"
