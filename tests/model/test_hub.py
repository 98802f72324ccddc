"""Pushing a model: to a stand-in of the hub's HTTP interface, which keeps what is committed."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

from pyqemb import Embedder, Reranker
from pyqemb.cli import main
from pyqemb.errors import ConfigError
from pyqemb.testing.tiny import answering_tokenizer, write_tiny_folder

API = "/api/models/org/mine"


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith(f"{API}/tree/"):
            files = self.server.files
            self.answer([{"type": "file", "path": p, "size": len(files[p]), "oid": "0" * 40} for p in files])
        else:
            siblings = [{"rfilename": path} for path in self.server.files]
            self.answer({"id": "org/mine", "sha": "a" * 40, "siblings": siblings, "tags": [], "private": True})

    def do_POST(self):
        path, body = self.path.partition("?")[0], self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_test":
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self.server.created = json.loads(body)
            self.answer({"url": f"{self.server.url}/org/mine"})
        elif path == f"{API}/preupload/main":
            files = json.loads(body)["files"]
            self.answer({
                "files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            })  # fmt: skip
        elif path == f"{API}/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del self.server.files[value["path"]]
            self.answer({"success": True, "commitOid": "b" * 40, "commitUrl": f"{self.server.url}/org/mine/commit/b"})
        else:
            self.answer({"errors": [], "warnings": []})  # validate-yaml

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files, server.created = f"http://127.0.0.1:{server.server_port}", {}, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("NO_PROXY", "*")
    yield server
    server.shutdown()
    server.server_close()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", [Embedder, Reranker])
def test_the_folder_of_save_pretrained_is_committed(hub, tmp_path, kind):
    base = write_tiny_folder(tmp_path / "base", prefix=True, max_position_embeddings=1024)
    if kind is Reranker:
        answering_tokenizer().save(str(base / "tokenizer.json"))
    model = kind.from_pretrained(base)
    hub.files["model-00001-of-00002.safetensors"] = b"of an older model"
    assert model.push_to_hub("org/mine", private=True) == f"{hub.url}/org/mine/commit/b"
    assert (hub.created["organization"], hub.created["name"]) == ("org", "mine")
    assert hub.created.get("visibility", hub.created.get("private")) in ("private", True)
    model.save_pretrained(tmp_path / "mine")
    assert {path: content for path, content in hub.files.items() if path != ".gitattributes"} == contents(
        tmp_path / "mine"
    )


def test_export_pushes_what_it_writes(hub, tmp_path, capsys):
    base = write_tiny_folder(tmp_path / "base")
    assert main(["export", str(base), "--out", str(tmp_path / "out"), "--push", "org/mine"]) == 0
    assert capsys.readouterr().out.endswith(f"pushed to {hub.url}/org/mine/commit/b\n")
    assert hub.files == contents(tmp_path / "out")


def test_refusals(hub, tmp_path, monkeypatch, capsys):
    base = write_tiny_folder(tmp_path / "base")
    model = Embedder.from_pretrained(base)
    with pytest.raises(ConfigError, match=r"org/mine: the hub refused the upload: .*401"):
        model.push_to_hub("org/mine", token="hf_other")
    with pytest.raises(ConfigError, match="mine: expected an id of the hub, ORG/NAME"):
        model.push_to_hub("mine")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["export", str(base), "--out", str(tmp_path / "out"), "--push", "org/mine"]) == 2
    assert "org/mine: pushing to the hub needs a token: hf auth login, or HF_TOKEN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not hub.files


def test_a_model_without_weights_downloads_none(tmp_path, monkeypatch):
    folder, patterns = write_tiny_folder(tmp_path / "model"), []
    (folder / "model.safetensors").unlink()

    def download(name, allow_patterns):
        patterns.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert next(Embedder.without_weights("some/model").parameters()).is_meta
    assert "*.json" in patterns
    assert not [pattern for pattern in patterns if "safetensors" in pattern]
