"""A chat server in a process of its own that fails one request in ten, each time in another way.

It prints its URL, and at the end of its standard input a JSON object: how often it did what, and the prompts that it
answered more than once.
"""

import importlib.util
import json
import sys
import time
from array import array
from pathlib import Path

spec = importlib.util.spec_from_file_location("chat_server", Path(__file__).parents[1] / "llm" / "server.py")
chat_server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chat_server)

TROUBLES = [500, 429, "cut", "not json", "slow", "cut body", "silent", 503, "no choices"]
LATE = {"slow"}  # an answer all the same
EVERY = 10


class Script:
    """What to do with each request."""

    def __init__(self):
        self.number = 0

    def __bool__(self):
        return True

    def pop(self, _):
        self.number += 1
        if self.number % EVERY:
            return "ok"
        turn, which = divmod(self.number // EVERY, len(TROUBLES))
        # Silence holds up all answers behind it, so that there would be little else.
        return "slow" if TROUBLES[which] == "silent" and turn % 5 else TROUBLES[which]


class Nothing(list):
    """Forgets what is put into it."""

    def append(self, _):
        pass


class Server(chat_server.FakeServer):
    def __init__(self):
        super().__init__(lambda messages: messages[-1]["content"].upper())
        self.script, self.seen, self.headers, self.answered = Script(), Nothing(), Nothing(), array("B")

    def act(self, handler, action, body):
        if action == "ok" or action in LATE:
            number = int(body["messages"][-1]["content"].split()[1])
            with self._lock:
                self.answered.extend([0] * (number + 1 - len(self.answered)))
                self.answered[number] += 1
        if action == "silent":  # longer than the client waits, which is long enough for a busy machine
            self.counts[action] += 1
            time.sleep(11)
            return
        super().act(handler, action, body)


server = Server()
print(server.url, flush=True)
sys.stdin.read()
again = [number for number, count in enumerate(server.answered) if count > 1]
missing = [number for number, count in enumerate(server.answered) if count == 0]
print(
    json.dumps({"counts": server.counts, "again": again[:10], "missing": missing[:10], "numbers": len(server.answered)})
)
