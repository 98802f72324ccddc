"""Progress bars on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SHOWN = ContextVar("shown", default=False)


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Inside, `progress_bar` shows a bar, or not, where its caller does not say."""
    token = _SHOWN.set(shown)
    try:
        yield
    finally:
        _SHOWN.reset(token)


@contextmanager
def progress_bar(name: str, total: int, shown: bool | None = None) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the number of items done since its last call.

    Work inside shows no bar of its own.

    Args:
        name: what the items are called.
        total: the number of items.
        shown: show the bar and leave it there when it is full (default: as `progress_bars` says, and remove it then).
    """
    if not (_SHOWN.get() if shown is None else shown):
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=shown is None) as progress, progress_bars(False):
        task = progress.add_task(name, total=total)
        yield lambda done: progress.advance(task, done)
