"""A local generator opens no folder that could make transformers run code."""

import json

import pytest

from pyqemb.errors import CheckpointError
from pyqemb.llm.local import LocalClient
from pyqemb.llm.request import Endpoint
from pyqemb.testing.tiny import write_tiny_folder

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "setting", [{"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}, {"_attn_implementation_internal": "evil/kernels"}]
)
def test_folders_that_bring_code_are_refused(tmp_path, setting):
    folder = write_tiny_folder(tmp_path / "model")
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **setting}))
    with pytest.raises(CheckpointError, match=f"{next(iter(setting))}.*makes loaders run code"):
        LocalClient(Endpoint(model=str(folder)))
    assert not canary.exists()


def test_a_model_that_is_not_here_is_named(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="nobody/nothing: no such folder, and not in the hub's cache"):
        LocalClient(Endpoint(model="nobody/nothing"))
