"""Concurrent requests with a limit, a store of answers, and counts of tokens and cost."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pyqemb.data.arguments import Count, checked
from pyqemb.errors import DataError
from pyqemb.llm.request import Answer, Endpoint, MalformedAnswerError, Request
from pyqemb.llm.store import Store

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Usage:
    """Usage statistics. `stored` answers cost nothing; tokens and cost are those of this run."""

    asked: int = 0
    stored: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: Counter[str] = field(default_factory=Counter)

    def cost(self, endpoint: Endpoint) -> float:
        """Return the cost of this run at the endpoint's prices, in their currency."""
        return (self.prompt_tokens * endpoint.price_in + self.completion_tokens * endpoint.price_out) / 1e6


class Asker:
    """`await asker(request)` returns the answer from the store, or requests it from the endpoint and stores it.

    Equal requests are sent once.

    Raises MalformedAnswerError if a request gets no answer, DataError if `give_up_after` requests in a row get none,
    ConfigError if the server rejects the request; received answers are stored.
    """

    @checked
    def __init__(self, endpoint: Endpoint, store: Store):
        self.endpoint, self.store, self.usage = endpoint, store, Usage()
        self._client: Any = None  # opened at the first request that is not stored
        self._limit = asyncio.Semaphore(endpoint.concurrency)
        self._under_way: dict[str, asyncio.Future[Answer]] = {}
        self._failed_in_a_row = 0

    async def __call__(self, request: Request) -> Answer:
        """Return the answer to a request, from the store if possible."""
        key = request.key(self.endpoint)
        known = self.store.get(key)
        if known is not None:
            self.usage.stored += 1
            return known
        if key not in self._under_way:
            task = self._under_way[key] = asyncio.ensure_future(self._ask(key, request))
            task.add_done_callback(lambda done: self._forget(key, done))
        return await asyncio.shield(self._under_way[key])

    def _forget(self, key: str, done: "asyncio.Future[Answer]") -> None:
        self._under_way.pop(key, None)
        if not done.cancelled():
            done.exception()  # mark the exception as retrieved, so that asyncio does not log it

    async def close(self) -> None:
        """Cancel the running requests and close the client."""
        for task in self._under_way.values():
            task.cancel()
        if self._client is not None:
            await self._client.close()

    async def _ask(self, key: str, request: Request) -> Answer:
        async with self._limit:
            client = self._opened()
            try:
                answer = await client.answer(request)
            except MalformedAnswerError as error:
                self._failed_in_a_row += error.reason.startswith("no answer")
                if self._failed_in_a_row >= self.endpoint.give_up_after:
                    where = self.endpoint.base_url or self.endpoint.model
                    raise DataError(
                        f"{where} does not answer ({error.reason}): {self._failed_in_a_row} requests in a row, each "
                        "tried "
                        f"{self.endpoint.retries + 1} times; the answers so far are in {self.store.path}"
                    ) from error
                raise MalformedAnswerError(error.reason, error.text, key) from error
            self._failed_in_a_row = 0
        self.store.put(key, request.body(self.endpoint), answer)
        self.usage.asked += 1
        self.usage.prompt_tokens += answer.prompt_tokens
        self.usage.completion_tokens += answer.completion_tokens
        return answer

    def _opened(self) -> Any:
        if self._client is None:

            def count(reason: str) -> None:
                self.usage.retries[reason] += 1

            if self.endpoint.backend == "transformers":
                from pyqemb.llm.local import LocalClient

                self._client = LocalClient(self.endpoint, count)
            else:
                from pyqemb.llm.client import ServerClient

                self._client = ServerClient(self.endpoint, count)
        return self._client


@checked
async def run_in_order(
    items: Iterable[T], work: Callable[[T], Awaitable[R]], window: Count
) -> AsyncIterator[tuple[T, R]]:
    """Yield (item, its result) in the order of the items, with up to `window` running concurrently.

    The first error is raised at once, also that of a later item, and cancels the other tasks: what they would receive
    may be lost.
    """
    waiting: deque[tuple[T, asyncio.Future[R]]] = deque()
    failed: asyncio.Future[asyncio.Future[R]] = asyncio.get_running_loop().create_future()

    def note(task: "asyncio.Future[R]") -> None:
        if not task.cancelled() and task.exception() is not None and not failed.done():
            failed.set_result(task)

    async def first() -> tuple[T, R]:
        item, task = waiting[0]
        await asyncio.wait((task, failed), return_when=asyncio.FIRST_COMPLETED)
        result = (task if task.done() else failed.result()).result()
        waiting.popleft()
        return item, result

    try:
        for item in items:
            waiting.append((item, asyncio.ensure_future(work(item))))
            waiting[-1][1].add_done_callback(note)
            if len(waiting) >= window or waiting[0][1].done():
                yield await first()
            else:
                await asyncio.sleep(0)
        while waiting:
            yield await first()
    finally:
        for _, task in waiting:
            task.cancel()
        await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)
