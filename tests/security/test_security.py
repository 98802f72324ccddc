"""Booby-trapped folders and files: no command runs what they hold, and each is refused with one line that names it."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from pyqemb import cli

LIBRARIES = ("transformers", "sentence_transformers", "datasets")
MISSING = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("security_traps", HERE / "traps.py")
traps = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = traps  # for its dataclass
spec.loader.exec_module(traps)

UNSHARE = ["unshare", "--map-root-user", "--net"]
MEMORY = 1500  # MB of a process, of which torch and transformers take 400
PROGRESS = re.compile(r"\r?Loading weights: .*")  # of transformers, which writes \r before it


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return drive(tmp_path_factory.mktemp("traps"), "one command")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return drive(tmp_path_factory.mktemp("traps"), "every command")


@cache
def no_namespace():
    """Why the kernel gives us no network namespace; empty if it does."""
    if shutil.which("unshare") is None:
        return "no unshare, of util-linux"
    tried = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True)
    return tried.stderr.strip() if tried.returncode else ""


def cut_off():
    """The start of a command line, after which the command has no route to another machine."""
    return [] if no_namespace() else [*UNSHARE, sys.executable, str(HERE / "cut_off.py")]


def drive(folder, *words):
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)} (pip install 'pyqemb[hf,datasets]')")
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), *sys.path])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HOME": str(folder / "cache")}
    env.pop("HF_HUB_OFFLINE", None)  # pyqemb asks for no network, also where it would get one
    command = [*cut_off(), sys.executable, HERE / "driver.py", folder, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def wrong(name, result):
    """What is wrong with the end of a command on an armed folder; nothing, if all is well."""
    said = PROGRESS.sub("", result["said"])
    errors = [line for line in said.splitlines() if line.startswith(("pyqemb ", "sweep: "))]
    named = traps.TRAPS[name].named if name in traps.TRAPS else None
    found = {
        "the canary": result["canary"],
        "a traceback": "Traceback" in said or "internal error" in said,
        "control characters": any(not letter.isprintable() for letter in said.replace("\n", "")),
        "memory": result["MB"] > MEMORY,
        "the network": "connects beyond this machine:" in said,
    }
    if named is None:
        found["a failure"] = result["status"] != 0
    else:
        found["the exit code"] = result["status"] not in (2, 3)
        found["no line of its own"] = len(errors) != 1
        found["the file is not named"] = not any(word in said for word in named)
    return [problem for problem, holds in found.items() if holds]


def check(report, record_property):
    attacks = report["attacks"]
    bad = [
        f"{name}, {verb}: {', '.join(problems)}: {result['status']}, {result['MB']} MB, {result['said'][-400:]!r}"
        for name, verbs in attacks.items()
        for verb, result in verbs.items()
        if (problems := wrong(name, result))
    ]
    assert not bad, "\n".join(bad)
    assert attacks.keys() == {*traps.TRAPS, "nothing"}
    armed = [attacks[name] for name in traps.TRAPS]
    assert {verb for verbs in armed for verb in verbs} == traps.COMMANDS.keys()
    record_property("R27", f"{len(armed)} traps, {sum(map(len, armed))} commands on them: no canary")


def test_no_trap_runs(quick, record_property):
    check(quick, record_property)


@pytest.mark.deep
def test_no_trap_runs_in_any_command(full, record_property):
    check(full, record_property)


@pytest.mark.parametrize("commands", [traps.COMMANDS, traps.VERBS], ids=["all", "quick"])
def test_every_verb_is_tried(commands):
    tried = {traps.COMMANDS[command][1].split()[0] for command in commands}
    assert tried | traps.OTHER_VERBS == cli.VERBS.keys()
    assert not tried & traps.OTHER_VERBS


def test_the_traps_are_armed(quick):
    """Loaders that do not check fall for them."""
    assert len(quick["naive"]) == 10
    assert all(quick["naive"].values()), quick["naive"]


def test_no_module_opens_archives():
    """Nothing can be written outside of a folder by the names in an archive."""
    code = "\n".join(path.read_text() for path in (HERE.parents[1] / "pyqemb").rglob("*.py"))
    assert not re.search(r"\b(zipfile|tarfile|unpack_archive|extractall)\b", code)


@pytest.mark.parametrize(
    ("runs", "commands"),
    [("quick", traps.VERBS), pytest.param("full", tuple(traps.COMMANDS), marks=pytest.mark.deep)],
)
def test_commands_work_without_a_network(request, record_property, runs, commands):
    """On sound folders, in a network namespace without routes; the check of the traps sees what each one tried."""
    if no_namespace():
        pytest.skip(f"no network namespace here: {no_namespace()}")
    verbs = request.getfixturevalue(runs)["attacks"]["nothing"]
    assert tuple(verbs) == commands
    assert {verb: result["said"] for verb, result in verbs.items() if result["status"] != 0} == {}
    record_property("R28", f"{len(verbs)} commands without a network")


REPRESENTATIVE = ["llm/test_ask.py", "data/test_hub.py"]


@pytest.mark.parametrize("part", [REPRESENTATIVE, pytest.param([""], marks=pytest.mark.deep)], ids=["part", "all"])
def test_the_tests_need_no_network(record_property, part):
    if no_namespace():
        pytest.skip(f"no network namespace here: {no_namespace()}")
    tests = HERE.parent
    options = ["-q", "-m", "not deep", "-p", "no:cacheprovider", "--ignore", HERE, "--ignore", tests / "soak"]
    command = [*cut_off(), sys.executable, "-m", "pytest", *options, *(tests / name for name in part)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-3000:]
    count = re.search(r"(\d+) passed", done.stdout)[1]
    record_property("R28", f"{count} tests in a network namespace without routes")


@pytest.mark.promise("R28", "connections of the tests beyond this machine are errors")
@pytest.mark.parametrize("host", ["192.0.2.1", "example.org", "2001:db8::1"])
def test_a_connection_beyond_this_machine_is_noticed(beyond, host):
    with pytest.raises(ConnectionRefusedError, match="is beyond this machine"):
        socket.create_connection((host, 80), timeout=1)
    assert beyond
    beyond.clear()


def test_connections_to_this_machine_are_not_noticed(beyond):
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
    socket.getaddrinfo(socket.gethostname(), 80)
    assert not beyond
