"""The command line: help without torch, arguments, exit codes."""

import argparse
import subprocess
import sys
import time

import pytest

from pyqemb.cli import VERBS, main, whole_parser


def test_help_is_quick_and_imports_no_torch():
    code = "import sys; from pyqemb.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(verb in result.stdout for verb in VERBS)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_without_torch(verb):
    code = (
        f"import sys; from pyqemb.cli import main\ntry: main(['{verb}', '--help'])\nfinally: assert 'torch' not in "
        "sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"pyqemb {verb}" in result.stdout


def test_every_argument_has_help():
    (verbs,) = (action for action in whole_parser()._actions if isinstance(action, argparse._SubParsersAction))
    silent = [(verb, x.dest) for verb, parser in verbs.choices.items() for x in parser._actions if not x.help]
    assert silent == []


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train", "--no-such-option"]])
def test_bad_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "pyqemb" in capsys.readouterr().err


def test_an_unknown_option_shows_the_usage_of_its_verb(capsys):
    with pytest.raises(SystemExit):
        main(["export", "model", "--out", "folder", "--fast"])
    error = capsys.readouterr().err
    assert error.startswith("usage: pyqemb export")
    assert error.endswith("pyqemb export: error: unrecognized arguments: --fast\n")


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("pyqemb ")
