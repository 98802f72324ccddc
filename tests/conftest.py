"""Shared fixtures: a seed for every test, a cache folder of its own, a chat server that misbehaves on request."""

import importlib.util
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes with as many threads as the machine has cores wait for each other: three times as slow. Before torch.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # of tests that ask for more threads

import pytest
import torch

_spec = importlib.util.spec_from_file_location("test_network", Path(__file__).parent / "network.py")
network = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(network)
BEYOND = network.watch()

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

if threading.current_thread() is threading.main_thread():
    # A shell gives its background jobs an ignored SIGINT, which the commands under test would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--poison", action="store_true", help="fill memory that nothing has written with NaN")
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in a random order")


def pytest_collection_modifyitems(config, items):
    if (seed := config.getoption("shuffle")) is not None:
        random.Random(seed).shuffle(items)


@pytest.fixture(autouse=True)
def poisoned_memory(request, monkeypatch):
    """With --poison, torch.empty and the buffer cache give NaN, or the largest integers."""
    if not request.config.getoption("poison"):
        yield
        return
    from pyqemb import _C

    def block(size, make=_C.Block):
        memory = make(size)
        torch.frombuffer(memory, dtype=torch.uint8).fill_(255)
        return memory

    monkeypatch.setattr(_C, "Block", block)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def beyond():
    """Attempts of this test to connect to other machines, which are refused; it must have removed those it wanted."""
    BEYOND.clear()
    yield BEYOND
    assert not BEYOND, "connections beyond this machine"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The user's cache is a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def run_line():
    """Runs a line of a page: run_line("pyqemb init run.toml"); also torchrun. It must end with exit code 0."""
    from pyqemb.cli import main

    def run(line):
        words = shlex.split(line)
        if words[0] == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-2000:]
            return
        assert words[0] == "pyqemb", f"do not know how to run {line!r}"
        assert main(words[1:]) == 0, line

    return run


@pytest.fixture(autouse=True)
def promises(request, record_property):
    """What the marks of a test say it shows, for docs/dev/reliability.md."""
    for mark in request.node.iter_markers("promise"):
        record_property(*mark.args)


@pytest.fixture
def serve():
    """Starts servers of tests/llm/server.py: serve(reply, script=...)."""
    pytest.importorskip("openai", reason="openai is not installed (pip install 'pyqemb[data]')")
    spec = importlib.util.spec_from_file_location("chat_server", Path(__file__).parent / "llm" / "server.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    servers = []

    def start(*args, **options):
        servers.append(module.FakeServer(*args, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
