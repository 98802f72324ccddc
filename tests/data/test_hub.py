"""Datasets of the hub: downloaded by the real package from a server on this machine, and read from its cache."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyqemb.data.example import read_examples
from pyqemb.errors import ConfigError, DataError

pytest.importorskip("datasets")
CODE = """
import sys
from pyqemb import read_examples

def show(source, **options):
    try:
        print([example.query for example in read_examples(source, **options)])
    except Exception as error:
        print(type(error).__name__, error)

show("hub://org/faq/pair", columns={"ignore": "id"})
show("hub://org/faq/pair", split="test", columns={"ignore": "id"})
show("hub://org/faq@main/other")
show("hub://org/faq/pair")
show("hub://org/faq")
show("org/faq")
"""


@pytest.fixture
def hub():
    spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).parent / "hub_server.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = module.start()
    yield server
    server.shutdown()
    server.server_close()


def test_from_a_server_and_then_from_the_cache(hub, tmp_path):
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "*",
    }

    def read(**more):
        done = subprocess.run(
            [sys.executable, "-c", CODE], env={**environment, **more}, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    lines = read()
    assert lines[:3] == ["['q']", "['t']", "['o']"]
    assert lines[3].startswith("DataError hub://org/faq/pair[0]: column 'id' is not understood")
    assert lines[4].startswith("DataError hub://org/faq: cannot be loaded: ValueError: Config name is missing")
    assert "['pair', 'other']" in lines[4]
    assert lines[4].endswith("(a subset is written as hub://ORG/NAME/SUBSET)")
    assert lines[5] == "DataError org/faq: no such file or folder (a dataset of the hub is written hub://org/faq)"
    hub.shutdown()
    hub.server_close()
    assert read(HF_HUB_OFFLINE="1")[:2] == lines[:2]
    nothing = read(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert nothing[0].startswith("DataError hub://org/faq/pair: cannot be loaded: ConnectionError")


def test_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for address in ("hub://faq", "hub://org/faq/a/b", "hub://org/faq?x", "hub://"):
        with pytest.raises(ConfigError, match=r"expected hub://ORG/NAME, optionally with @REVISION and /SUBSET"):
            list(read_examples(address))
    (tmp_path / "org" / "faq").mkdir(parents=True)
    with pytest.raises(DataError, match="hub://org/faq: the folder org/faq is here"):
        list(read_examples("hub://org/faq"))
