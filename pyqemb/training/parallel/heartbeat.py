"""Detection of lost ranks.

A thread in each rank sends a heartbeat every second to rank 0 over a separate connection.

Rank 0 notices a rank whose connection is closed, or that has sent nothing for `timeout` seconds, and reports it to the
others, which notice the loss of rank 0 in the same way. A rank that evaluates or saves for hours still sends
heartbeats, so the collectives need no timeout. An exception cannot reach a rank that waits in a collective: its process
exits with the exit code of the lost rank's error, or with that of RankError.
"""

import asyncio
import json
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

from pyqemb.data.machine import exit_code_of
from pyqemb.data.strict_json import parse
from pyqemb.errors import RankError

_INTERVAL = 1.0  # seconds between two heartbeats
_GRACE = 5.0  # seconds for the main thread to exit by itself: its own error is more specific, or a collective fails
# a loop that took longer was suspended (a stopped process, a sleeping machine); that time does not count
_PAUSED = 5.0


@dataclass
class _Peer:
    """The rank at the other end of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    rank: int
    name: str
    heard: float = field(default_factory=time.monotonic)
    left: bool = False


class Heartbeat:
    """Monitors the ranks from a thread until `close`. `broadcast` returns the value of rank 0 on all ranks.

    Raises RankError if rank 0 cannot be reached.
    """

    def __init__(self, rank: int, size: int, timeout: float, broadcast: Callable[[Any], Any]):
        self.rank, self.size, self.timeout = rank, size, timeout
        self.lost: str | None = None  # which rank is lost, and why
        self.exit_code = RankError.exit_code  # that of the lost rank's error
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._name = f"rank {rank} ({platform.node()}, pid {os.getpid()})"
        self._closing, self._noticed = threading.Event(), threading.Event()
        self._goodbye: dict[str, Any] = {"bye": True}
        self._peers: list[_Peer] = []
        self._missing = set(range(1, size)) if rank == 0 else set()
        self._deadline = 0.0  # when this process exits, once a rank is lost
        self._ready: Future[list[int]] = Future()
        if rank == 0:
            self._token = secrets.token_hex(8)
            ports = self._start(self._serve())
            names = list(dict.fromkeys([os.environ.get("MASTER_ADDR", "localhost"), platform.node()]))
            broadcast((names, ports, self._token, self._name))
        else:
            names, ports, self._token, first = broadcast(None)
            self._start(self._join(names, ports, first))

    def _start(self, watching: Any) -> list[int]:
        self._thread = threading.Thread(target=asyncio.run, args=(watching,), name="heartbeat", daemon=True)
        self._thread.start()
        return self._ready.result()

    def wait_for_loss(self, seconds: float) -> str | None:
        """Return which rank is lost, for a main thread whose collective has failed.

        The heartbeat may report the loss a moment after the collective fails.
        """
        self._noticed.wait(seconds)
        return self.lost

    def close(self, error: BaseException | None) -> None:
        """Stop. An error is sent to the other ranks, which then exit too."""
        if error is not None:
            self._goodbye = {"error": f"{type(error).__name__}: {error}"[:2000], "exit_code": exit_code_of(error)}
        self._closing.set()
        self._thread.join(2 * _GRACE)

    async def _serve(self) -> None:
        try:
            server = await asyncio.start_server(self._greet, port=0)
        except OSError as error:
            self._ready.set_exception(RankError(f"rank 0 cannot listen for the other ranks: {error}"))
            return
        self._ready.set_result([each.getsockname()[1] for each in server.sockets])  # IPv4, IPv6
        await self._watch()
        server.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Rank 0: receive the identification of a rank; other connections may send anything."""
        try:
            message = _message(await reader.readline())
            if message["token"] != self._token or message["rank"] not in range(1, self.size):
                raise ValueError("a stranger")
            peer = _Peer(reader, writer, message["rank"], message["name"])
        except (ValueError, KeyError, OSError):
            writer.close()
            return
        writer.write(self._token.encode() + b"\n")
        self._missing.discard(peer.rank)
        self._peers.append(peer)
        with suppress(asyncio.CancelledError):  # when this rank stops; asyncio would print a traceback
            await self._listen(peer)

    async def _join(self, names: list[str], ports: list[int], first: str) -> None:
        for name, port in product(names, ports):
            try:
                reader, writer = await asyncio.wait_for(asyncio.open_connection(name, port), 10)
                writer.write(json.dumps({"token": self._token, "rank": self.rank, "name": self._name}).encode() + b"\n")
                if await asyncio.wait_for(reader.readline(), 10) == self._token.encode() + b"\n":
                    break
            except (OSError, ValueError, asyncio.TimeoutError):
                continue
        else:
            self._ready.set_exception(RankError(f"rank 0 cannot be reached at {' or '.join(names)}, port {port}"))
            return
        self._peers = [_Peer(reader, writer, 0, first)]
        self._ready.set_result(ports)
        listening = asyncio.ensure_future(self._listen(self._peers[0]))
        await self._watch()
        listening.cancel()

    async def _listen(self, peer: _Peer) -> None:
        reason = "died: its connection is closed"
        with suppress(OSError):
            try:
                while (line := await peer.reader.readline()).endswith(b"\n"):  # a rank may die while it sends a line
                    peer.heard = time.monotonic()
                    self._take(peer, _message(line))
            except ValueError as error:  # also for a line longer than the limit of the reader
                reason = f"sent an invalid heartbeat: {error}"
        if not peer.left:
            peer.left = True
            self._lose(f"{peer.name} {reason}")

    def _take(self, peer: _Peer, message: dict[str, Any]) -> None:
        peer.name = message.get("name", peer.name)
        peer.left = "bye" in message or "error" in message
        exit_code = message.get("exit_code", RankError.exit_code)
        if "lost" in message:
            self._lose(message["lost"], exit_code)
        elif "error" in message:
            self._lose(f"{peer.name} left with {message['error']}", exit_code)

    async def _watch(self) -> None:
        start = last = time.monotonic()
        beaten = 0.0
        while not self._closing.is_set():
            await asyncio.sleep(0.1)
            now = time.monotonic()
            if now - last > _PAUSED:
                start = now
                for peer in self._peers:
                    peer.heard = now
            last = now
            if now - beaten >= _INTERVAL:
                beaten = now
                self._tell({"name": self._name})
            self._check(now, start)
        self._tell(self._goodbye if self.lost is None else self._news())
        end = time.monotonic() + _GRACE
        # Rank 0 waits until the others have stopped: they cannot distinguish a finished rank 0 from a lost one.
        while self.rank == 0 and time.monotonic() < end and not all(peer.left for peer in self._peers):
            await asyncio.sleep(0.05)
        for peer in self._peers:
            peer.writer.close()

    def _check(self, now: float, start: float) -> None:
        if self._missing and now - start > self.timeout:
            self._lose(f"rank {min(self._missing)} has not started within {self.timeout:g} s")
        for peer in self._peers:
            if not peer.left and now - peer.heard > self.timeout:
                self._lose(f"{peer.name} is stopped or its machine is gone: no heartbeat for {now - peer.heard:.0f} s")
        if self._agent is not None and os.getppid() != self._agent:
            self._lose(f"the agent of {self._name} died (torchrun, pid {self._agent})")
        if self.lost is not None and now > self._deadline:
            self._end()

    def _lose(self, what: str, exit_code: int = RankError.exit_code) -> None:
        if self.lost is None:
            self.lost, self.exit_code = what, exit_code
            self._deadline = time.monotonic() + _GRACE
            self._noticed.set()
            self._tell(self._news())

    def _news(self) -> dict[str, Any]:
        return {"lost": self.lost, "exit_code": self.exit_code}

    def _tell(self, message: dict[str, Any]) -> None:
        for peer in self._peers:
            if not peer.writer.is_closing():
                peer.writer.write(json.dumps(message).encode() + b"\n")

    def _end(self) -> NoReturn:
        """End the process, because its main thread waits for a lost rank."""
        text = f"pyqemb train: {lost_message(self.rank, self.lost or '')}; it was in {_place()}\n"
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.write(2, text.encode())
        os._exit(self.exit_code)


_FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("token", "name", "lost", "error"), lambda value: isinstance(value, str)),
    "rank": lambda value: type(value) is int,
    "exit_code": lambda value: type(value) is int and 0 < value < 256,
    "bye": lambda value: value is True,
}


def _message(line: bytes) -> dict[str, Any]:
    """Parse a line of another rank. ValueError if it is not a JSON object with the fields of a heartbeat."""
    message = parse(line, "line")
    if not isinstance(message, dict):
        raise ValueError("not a JSON object")
    for name, value in message.items():
        if name not in _FIELDS or not _FIELDS[name](value):
            raise ValueError(f"unknown field or value: {name!r:.80}: {value!r:.80}")
    return message


def lost_message(rank: int, lost: str) -> str:
    """Return the error message of a rank that stops because another one is lost."""
    return f"{lost}; rank {rank} stops; continue from the last checkpoint with --resume auto"


def _place() -> str:
    """The innermost function of pyqemb in the main thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and "pyqemb" not in frame.f_code.co_filename.split(os.sep):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}: {frame.f_code.co_name}" if frame is not None else "user code"
