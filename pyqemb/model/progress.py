"""Progress bars on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SHOWN = ContextVar("shown", default=False)


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Context that sets whether `progress_bar` shows a bar by default."""
    token = _SHOWN.set(shown)
    try:
        yield
    finally:
        _SHOWN.reset(token)


@contextmanager
def progress_bar(name: str, total: int, shown: bool | None = None) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the number of items done since its last call.

    Progress bars inside of this context are not shown.

    Args:
        name: the name of the items.
        total: the number of items.
        shown: show the bar and leave it on the terminal when it is full (default: as set by `progress_bars`, and remove
            it when it is full).
    """
    if not (_SHOWN.get() if shown is None else shown):
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=shown is None) as progress, progress_bars(False):
        task = progress.add_task(name, total=total)
        yield lambda done: progress.advance(task, done)
