"""What is asked, what comes back, and what a JSON answer must be to count."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

T = TypeVar("T", bound=BaseModel)
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_THOUGHT = re.compile(r"^.*?</think>", re.DOTALL)


class Endpoint(BaseModel):
    """Where answers come from: a server that speaks OpenAI's protocol (vLLM, SGLang, llama.cpp, a hosted one), or a local folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str  # the server's name for it, or a folder with `backend = "transformers"`
    backend: Literal["openai", "transformers"] = "openai"
    base_url: str | None = None  # None: OPENAI_BASE_URL, or OpenAI's own
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key; servers of one's own need none
    structured: Literal["auto", "json_schema", "json_object", "off"] = (
        "auto"  # auto: the strictest that the server takes
    )
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(512, ge=1)
    extra: dict[str, Any] = Field(default_factory=dict)  # further fields of the request body, as the server knows them
    concurrency: int = Field(32, ge=1)  # requests under way at a time; a local model's batch
    timeout: float = Field(120.0, gt=0)  # seconds without an answer, of one try
    retries: int = Field(
        6, ge=0
    )  # after the first try: 429, 5xx, timeouts, cut connections, answers that are no answers
    max_wait: float = Field(60.0, gt=0)  # seconds between two tries, at most
    give_up_after: int = Field(8, ge=1)  # requests in a row that stay without an answer
    price_in: float = Field(0.0, ge=0)  # of a million prompt tokens
    price_out: float = Field(0.0, ge=0)


@dataclass(frozen=True)
class Request:
    """One question. `schema`: the JSON schema that the answer should follow, where the server can make it."""

    messages: tuple[tuple[str, str], ...]  # (role, text)
    seed: int = 0
    schema: dict[str, Any] | None = None

    def body(self, endpoint: Endpoint) -> dict[str, Any]:
        """Everything that the answer depends on."""
        return {
            "model": endpoint.model,
            "messages": [{"role": role, "content": text} for role, text in self.messages],
            "temperature": endpoint.temperature,
            "top_p": endpoint.top_p,
            "max_tokens": endpoint.max_tokens,
            "seed": self.seed,
            **({"schema": self.schema} if self.schema is not None else {}),
            **({"extra": endpoint.extra} if endpoint.extra else {}),
        }

    def key(self, endpoint: Endpoint) -> str:
        """sha256 of the body: equal requests to one model have one key, whichever server has it."""
        return hashlib.sha256(json.dumps(self.body(endpoint), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Answer:
    text: str
    finish: str = "stop"  # "length": cut off at max_tokens
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def row(self) -> dict[str, Any]:
        return asdict(self)


class Malformed(Exception):
    """An answer that cannot be used. `reason` is one of few, to be counted."""

    def __init__(self, reason: str, text: str = "", key: str = ""):
        super().__init__(reason)
        self.reason, self.text, self.key = reason, text, key


def parse(answer: Answer, kind: type[T]) -> T:
    """The JSON object in an answer, checked. A fence, a chain of thought before it and prose around it are passed over.

    Raises Malformed: "empty", "cut off", "no JSON", "no object", "FIELD missing", "FIELD wrong".
    """
    text = _THOUGHT.sub("", answer.text).strip()
    if not text:
        raise Malformed("cut off" if answer.finish == "length" else "empty", answer.text)
    fenced = _FENCE.search(text)
    value = _first_object(fenced[1] if fenced else text)
    if value is None:
        raise Malformed("cut off" if answer.finish == "length" else "no JSON", answer.text)
    if not isinstance(value, dict):
        raise Malformed("no object", answer.text)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else "answer"
        raise Malformed(f"{field} {'missing' if first['type'] == 'missing' else 'wrong'}", answer.text) from error


def _first_object(text: str) -> Any:
    """The first JSON object in the text; else any JSON value that the text is; else None."""
    decoder = json.JSONDecoder(strict=False)  # models write line ends into strings
    for match in re.finditer(r"\{", text):
        try:
            return decoder.raw_decode(text, match.start())[0]
        except (json.JSONDecodeError, RecursionError):
            continue
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
