"""A client of servers with OpenAI's API, built on the official client.

It handles retries, structured output and error responses.
"""

import asyncio
import json
import os
import random
import re
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from time import time
from typing import Any

from pyqemb.errors import ConfigError
from pyqemb.llm.request import OMITTABLE, Answer, Endpoint, MalformedAnswerError, Request
from pyqemb.llm.response import RetryableError, answer_of, clean, words_of

_LEVELS = ("json_schema", "json_object", "off")
_STRUCTURE = ("response_format", "json_schema", "json_object")  # in error messages of servers
_FIRST_WAIT = 0.5  # seconds; doubled for each retry


class ServerClient:
    """Answers requests; callers may run many concurrently.

    `on_retry(reason)` is called before each further try.
    """

    def __init__(self, endpoint: Endpoint, on_retry: Callable[[str], None] = lambda reason: None):
        try:
            import openai
        except ModuleNotFoundError as error:
            raise ConfigError("asking a server needs openai: pip install 'pyqemb[data]'") from error
        self._openai, self.endpoint, self._on_retry = openai, endpoint, on_retry
        self._level = _LEVELS.index("json_schema" if endpoint.structured == "auto" else endpoint.structured)
        self._random = random.Random(0)
        key = os.environ.get(endpoint.api_key_env)
        if key is None and endpoint.base_url is None and "OPENAI_BASE_URL" not in os.environ:
            raise ConfigError(f"{endpoint.api_key_env} is not set, and base_url names no server of one's own")
        self._client = openai.AsyncOpenAI(
            api_key=key or "none", base_url=endpoint.base_url, timeout=endpoint.timeout, max_retries=0
        )

    async def answer(self, request: Request) -> Answer:
        """Send the request until the server answers or the retries are exhausted.

        Raises:
            ConfigError: the key, the model or the request is rejected, so a retry would not help.
            MalformedAnswerError: "no answer: ..." after the last retry, or "request too long".
        """
        for attempt in range(self.endpoint.retries + 1):
            try:
                return await self._once(request)
            except RetryableError as again:
                if attempt == self.endpoint.retries:
                    raise MalformedAnswerError(f"no answer: {again.reason}") from again
                self._on_retry(again.reason)
                wait = again.wait if again.wait is not None else _FIRST_WAIT * 2**attempt * self._random.uniform(0.5, 1)
                await asyncio.sleep(min(wait, self.endpoint.max_wait))
        raise AssertionError

    async def close(self) -> None:
        """Close the connections to the server."""
        await self._client.close()

    async def _once(self, request: Request) -> Answer:
        openai, level = self._openai, self._level
        body = request.body(self.endpoint)
        schema, extra = body.pop("schema", None), body.pop("extra", None)
        for field in self.endpoint.omit:
            body.pop(field, None)
        if schema is not None and _LEVELS[level] != "off":
            kind = _LEVELS[level]
            named = {"json_schema": {"name": "answer", "schema": schema, "strict": True}}
            body["response_format"] = {"type": kind, **(named if kind == "json_schema" else {})}
        try:
            # The timeout of the client is per read; a server that sends a byte now and then would never reach it.
            asked = self._client.chat.completions.create(**body, extra_body=extra)
            completion = await asyncio.wait_for(asked, self.endpoint.timeout)
        except (openai.APITimeoutError, asyncio.TimeoutError) as error:
            raise RetryableError("timeout") from error
        except openai.APIConnectionError as error:
            raise RetryableError("connection") from error
        except openai.APIStatusError as error:
            return await self._refused(error, request, level, {**body, **(extra or {})})
        except (json.JSONDecodeError, openai.APIResponseValidationError, UnicodeDecodeError) as error:
            raise RetryableError("broken response") from error
        return answer_of(completion, str(self._client.base_url))

    async def _refused(self, error: Any, request: Request, level: int, sent: dict[str, Any]) -> Answer:
        status, words = error.status_code, words_of(error.body) or clean(error.message)
        quota = getattr(error, "code", None) == "insufficient_quota"
        structure = any(name in words for name in _STRUCTURE)
        others = sent.keys() - {"model", "messages", "response_format"}
        named = sorted(name for name in others if re.search(rf"\b{re.escape(name)}\b", f"{words} {error.param}"))
        unknown = structure or (status in (400, 422) and not named)  # some servers return 500 for this
        auto = "response_format" in sent and self.endpoint.structured == "auto"
        if auto and unknown and not _too_long(status, words):
            self._level = max(self._level, level + 1)  # the server does not support it; do not try again
            return await self._once(request)
        if (status == 429 and not quota) or status >= 500 or status in (408, 409):
            raise RetryableError(f"status {status}", _retry_after(error.response.headers)) from error
        if status in (400, 413, 422) and _too_long(status, words):
            raise MalformedAnswerError("request too long") from error
        message = f"the server at {self._client.base_url} refuses (status {status}): {words}"
        if status in (401, 403):
            message += f"; the key is read from {self.endpoint.api_key_env}"
        if status in (400, 422):
            first = 0 if self.endpoint.structured == "auto" else level
            formats = [f"response_format {name}" for name in _LEVELS[first : level + 1] if request.schema is not None]
            message += f"; tried with {', '.join([*formats, *sorted(others)])}"
            if omitted := [name for name in named if name in OMITTABLE]:
                message += f"; omit = {json.dumps(omitted)} in the endpoint leaves it out"
        raise ConfigError(message) from error


def _too_long(status: int, words: str) -> bool:
    return status == 413 or "context" in words.lower() or "too long" in words.lower()


def _retry_after(headers: Any) -> float | None:
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except (TypeError, ValueError, OverflowError):
        return None
