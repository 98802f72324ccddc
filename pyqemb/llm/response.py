"""Parsing of a server's response: an answer, a refusal, or an error with status 200."""

from typing import Any

from pyqemb.errors import ConfigError
from pyqemb.llm.request import Answer, MalformedAnswerError

_MAX_WORDS = 300  # characters of a server's message that are shown
_THOUGHTS = {"thinking", "reasoning", "redacted_thinking", "reasoning_content"}  # parts of a content without the answer
_CUT_OFF = {"length", "max_tokens", "max_output_tokens", "model_length"}


class RetryableError(Exception):
    """The request may succeed if it is sent again, after `wait` seconds if the server specified them."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.reason, self.wait = reason, wait


def answer_of(completion: Any, server: str) -> Answer:
    """The answer in a chat completion of the client of `openai`.

    Raises:
        RetryableError: no answer, but a retry may help. ConfigError: an error that a retry would not change.
        MalformedAnswerError: a content that is neither text nor parts of text.
    """
    choice = _first(completion)
    error = _get(choice, "error") or (_error_of(completion) if choice is None else None)
    if error is not None:
        words, code = words_of(error), _get(error, "code")
        if str(code) in ("400", "401", "402", "403", "404", "413", "422"):
            raise ConfigError(f"the server at {server} refuses (code {code}): {words}")
        raise RetryableError(f"the server says: {words}")
    message = _get(choice, "message")
    if message is None:
        raise RetryableError("broken response")
    text, refusal = _text(_get(message, "content"))
    refusal = _get(message, "refusal") or refusal
    finish = str(_get(choice, "finish_reason") or "stop").lower()
    if finish == "content_filter" and refusal is None:
        refusal = "finish_reason content_filter"
    usage = _get(completion, "usage")
    return Answer(
        text, "length" if finish in _CUT_OFF else finish,
        _tokens(_get(usage, "prompt_tokens")), _tokens(_get(usage, "completion_tokens")),
        None if refusal is None else clean(str(refusal)),
    )  # fmt: skip


def _tokens(count: Any) -> int:
    """A count of tokens of a server; 0 for what is none."""
    return count if type(count) is int and 0 <= count < 2**63 else 0


def words_of(error: Any) -> str:
    """The message in the body of an error, in any of the known formats; "" without a message."""
    for name in ("error", "message", "detail", "msg"):
        inner = _get(error, name)
        if inner:
            return words_of(inner)
    if isinstance(error, list) and error:
        return words_of(error[0])
    return clean(str(error)) if error else ""


def clean(words: str) -> str:
    """The text as one line without control characters, truncated."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in words[: 4 * _MAX_WORDS]).split())
    return line if len(line) <= _MAX_WORDS else f"{line[:_MAX_WORDS]}..."


def _first(completion: Any) -> Any:
    choices = _get(completion, "choices")
    return choices[0] if isinstance(choices, list) and choices else None


def _error_of(completion: Any) -> Any:
    if (error := _get(completion, "error")) is not None:
        return error
    is_error = _get(completion, "object") == "error" or _get(completion, "choices") is None
    return completion if is_error and any(_get(completion, name) for name in ("message", "detail")) else None


def _text(content: Any) -> tuple[str, str | None]:
    """Return (the text of a content, the text of a refusal in it)."""
    if content is None or isinstance(content, str):
        return content or "", None
    texts, refusal = [], None
    for part in content if isinstance(content, list) else [content]:
        kind = "text" if isinstance(part, str) else _get(part, "type")
        if kind in ("text", "output_text"):
            text = part if isinstance(part, str) else _get(part, "text")
            if not isinstance(text, str):
                raise MalformedAnswerError("content part without text")
            texts.append(text)
        elif kind == "refusal":
            refusal = str(_get(part, "refusal"))
        elif kind not in _THOUGHTS:
            raise MalformedAnswerError(clean(f"content of type {kind or type(part).__name__}"))
    return "".join(texts), refusal


def _get(value: Any, name: str) -> Any:
    """A field of an object of the client, or of a dict that it left unparsed."""
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None) if value is not None else None
