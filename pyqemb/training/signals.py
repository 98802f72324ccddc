"""SIGTERM and SIGINT stop the run at the next step boundary; a second signal ends the process at once."""

import os
import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = signal.SIGTERM, signal.SIGINT


class StopRequest:
    """`name` is the received signal, None before.

    Signals are handled in the main thread only, as Python requires.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.name is not None:
            os._exit(128 + number)
        self.name = signal.Signals(number).name
