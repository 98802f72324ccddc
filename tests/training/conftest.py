"""A folder for runs."""

import json

import pytest

from pyqemb.testing.tiny import write_tiny_folder


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The current folder, with a model in `base` and 32 pairs with a negative in pairs.jsonl."""
    monkeypatch.chdir(tmp_path)
    write_tiny_folder("base")
    rows = [{"query": f"{n} {n + 1}", "positive": f"{n + 1} {n}", "negatives": [f"{n}"]} for n in range(32)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path
