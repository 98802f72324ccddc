"""A stand-in of the Hugging Face Hub for one dataset: the HTTP interface that downloads use."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40
FILES = {
    "README.md": b"""---
configs:
- config_name: pair
  data_files:
  - {split: train, path: pair/train.jsonl}
  - {split: test, path: pair/test.jsonl}
- config_name: other
  data_files:
  - {split: train, path: other.jsonl}
---
""",
    "pair/train.jsonl": b'{"question": "q", "answer": "p", "id": 1}\n',
    "pair/test.jsonl": b'{"question": "t", "answer": "p", "id": 2}\n',
    "other.jsonl": b'{"query": "o", "positive": "p"}\n',
}


class Hub(BaseHTTPRequestHandler):
    """Serves FILES as the dataset `org/faq`; `requests` lists what was asked for."""

    requests: ClassVar[list[str]] = []

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.requests.append(f"{self.command} {path}")
        api, files = "/api/datasets/org/faq", "/datasets/org/faq/resolve/"
        if path.startswith(files):
            _, _, name = path.removeprefix(files).partition("/")
            return self.answer(FILES.get(name))
        if path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name} for name in FILES]
            return self.answer({"id": "org/faq", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})
        if path.startswith(f"{api}/tree/"):
            folder = "/".join(path.removeprefix(f"{api}/tree/").split("/")[1:])
            return self.answer([entry(name) for name in FILES if name.startswith(folder)])
        return self.answer(None)

    do_HEAD = do_GET

    def do_POST(self):
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.requests.append(f"POST {self.path}")
        paths = (
            json.loads(asked)["paths"]
            if asked.startswith("{")
            else [
                unquote(part.partition("=")[2].replace("+", " "))
                for part in asked.split("&")
                if part.startswith("paths=")
            ]
        )
        found = [entry(name) for name in FILES if name in paths]
        folders = {p for p in paths if any(name.startswith(f"{p}/") for name in FILES)}
        self.answer([*found, *({"type": "directory", "path": p, "oid": "0" * 40} for p in folders)])

    def answer(self, content):
        status = 404 if content is None else 200
        body = content if isinstance(content, bytes) else json.dumps(content or []).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def entry(name):
    content = FILES[name]
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def start():
    """A server on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
