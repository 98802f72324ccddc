"""A real HTTP server that speaks OpenAI's chat protocol, and misbehaves on request."""

import json
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeServer:
    """`script`: what to do with each request in turn ("ok" once it is used up): ok, slow, silent, cut, cut body, not
    json, no choices, prose, a status, or a body. `reply(prompt)` makes the text. `seen` holds the bodies that got an
    answer or an error.
    """

    def __init__(
        self,
        reply=lambda messages: "{}",
        script=(),
        structured=("json_schema", "json_object"),
        delay=0.0,
        unknown=400,
        unsupported=None,
    ):
        self.reply, self.script, self.structured, self.delay = reply, list(script), structured, delay
        self.unknown, self.unsupported = unknown, unsupported
        self.seen, self.headers, self.counts, self.most = [], [], Counter(), 0
        self._open, self._lock = 0, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    server._open += 1
                    server.most = max(server.most, server._open)
                    server.seen.append(body)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    action = server.script.pop(0) if server.script else "ok"
                try:
                    server.act(self, action, body)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with server._lock:
                        server._open -= 1

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass

        self._http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def act(self, handler, action, body):
        self.counts[str(action)] += 1
        if action == "silent":
            time.sleep(3)
            return
        if action == "cut":
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        wanted = body.get("response_format", {}).get("type")
        if self.unsupported in body:
            self.send(handler, {"error": {"message": f"Unsupported parameter: {self.unsupported!r}"}}, 400)
        elif isinstance(action, dict):
            self.send(handler, action)
        elif isinstance(action, int):
            self.send(handler, {"error": {"message": f"error {action}"}}, action)
        elif wanted and wanted not in self.structured:
            self.send(handler, {"error": {"message": f"unknown response_format {wanted}"}}, self.unknown)
        elif action == "not json":
            self.send(handler, b"<html>gateway</html>")
        elif action == "no choices":
            self.send(handler, {"choices": []})
        else:
            time.sleep(0.3 if action == "slow" else self.delay)
            text = "I would rather not." if action == "prose" else self.reply(body["messages"])
            self.send(handler, completion(text), cut=action == "cut body")

    @staticmethod
    def send(handler, body, status=200, cut=False):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        if status == 429:
            handler.send_header("Retry-After", "0.05")
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._http.shutdown()
        self._http.server_close()


def completion(text):
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
