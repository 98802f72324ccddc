"""Records of requests to language models."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
from arguments_place import Place, Records, like, options
from torch import Tensor

from pyqemb.llm import Answer, Asker, Endpoint, Request, Store, parse, run_in_order


async def twice(item: int) -> int:
    return 2 * item


def closed(kind: Callable[..., Any]) -> Callable[..., Any]:
    return like(kind, lambda **given: kind(**given).close())


def collected(function: Callable[..., Any]) -> Callable[..., Any]:
    async def collect(**given: Any) -> list[Any]:
        return [item async for item in function(**given)]

    return like(function, lambda **given: asyncio.run(collect(**given)))


def add(records: Records, place: Place) -> None:
    record = records.record
    answer, request = Answer('{"model": "m"}'), Request((("user", "text"),))
    record("llm.Answer", Answer, lambda r: dict(text="text") | options(r, finish="stop", prompt_tokens=3, refusal="no"))
    record(
        "llm.Request",
        Request,
        lambda r: dict(messages=(("user", "text"),)) | options(r, seed=3, schema={}),
        dict(messages=[[("user",)], [("a", "b", "c")], [("a", 5)], "ab"]),
    )
    record("llm.parse", parse, lambda r: dict(answer=answer, kind=Endpoint), dict(kind=[int, Answer]))
    endpoint = Endpoint(model="m")
    record("llm.Asker", Asker, lambda r: dict(endpoint=endpoint, store=place.store))
    record(
        "llm.Store",
        closed(Store),
        lambda r: dict(path=place.new(".sqlite")),
        dict(path=[place.folder, place.file]),
        names=dict(path=r"\bpath\b|cannot be used|at-all|directory|null|pairs"),
        cheap=False,
        fine=dict(path=["", "text"]),
    )
    record("llm.Store.get", place.store.get, lambda r: dict(key="key"))
    record(
        "llm.Store.put",
        place.store.put,
        lambda r: dict(key="key", request={"a": 1}, answer=answer),
        dict(request=[{"a": object()}]),
    )
    record(
        "llm.run_in_order",
        collected(run_in_order),
        lambda r: dict(items=[1, 2], work=twice, window=r.randint(1, 3)),
        fine=dict(items=lambda value: isinstance(value, Tensor | np.ndarray)),
    )
    record("llm.Request.body", request.body, lambda r: dict(endpoint=endpoint))
    record("llm.Request.key", request.key, lambda r: dict(endpoint=endpoint))
