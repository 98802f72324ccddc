"""Requests, answers, and the parsing of JSON answers."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar, get_args

from pydantic import AliasChoices, BaseModel, Field, ValidationError, model_validator

from pyqemb.data import strict_json
from pyqemb.data.arguments import NotNegative, check_fields, checked
from pyqemb.data.settings import StrictModel
from pyqemb.errors import DataError
from pyqemb.llm.candidates import candidates

T = TypeVar("T", bound=BaseModel)


Omittable = Literal["temperature", "top_p", "max_tokens", "seed"]
OMITTABLE = get_args(Omittable)
# Fields of the request body that have their own setting or would change the form of an answer.
_OWN_FIELDS = {"model", "messages", "stream", "n", *OMITTABLE}


class Endpoint(StrictModel):
    """The language model that answers: a server that speaks OpenAI's protocol, or a local folder.

    Servers are vLLM, SGLang, llama.cpp or a hosted one.
    """

    model: str = Field(
        description='Name of the model on the server. With `backend = "transformers"`, a model folder.',
        examples=["Qwen/Qwen3-32B"],
    )
    backend: Literal["openai", "transformers"] = Field(
        "openai",
        description="Where the model runs. `openai`: on a server that speaks OpenAI's protocol; `transformers`: in "
        "this process.",
        examples=["transformers"],
    )
    base_url: str | None = Field(
        None,
        description="URL of the server (default: OPENAI_BASE_URL, or OpenAI's own).",
        examples=["http://localhost:8000/v1"],
    )
    api_key_env: str = Field(
        "OPENAI_API_KEY",
        description="Environment variable that holds the API key. Servers of your own need none.",
        examples=["MY_API_KEY"],
    )
    structured: Literal["auto", "json_schema", "json_object", "off"] = Field(
        "auto",
        description="How answers are held to JSON. `auto` is the strictest way that the server supports.",
        examples=["json_object"],
    )
    temperature: float = Field(0.7, ge=0, description="Sampling temperature.", examples=[0.0])
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus sampling: probability mass kept.", examples=[1.0])
    max_tokens: int = Field(512, ge=1, description="Maximum tokens of an answer.", examples=[1024])
    omit: tuple[Omittable, ...] = Field(
        (), description="Fields left out of the request because the server refuses them.", examples=[["seed"]]
    )
    extra_body: dict[str, Any] = Field(
        {},
        validation_alias=AliasChoices("extra_body", "extra"),
        description="Additional fields of the request.",
        examples=[{"chat_template_kwargs": {"enable_thinking": False}}],
    )
    concurrency: int = Field(
        32,
        ge=1,
        description="Requests at a time. For a model in this process, the batch size.",
        examples=[64],
    )
    timeout: float = Field(120.0, gt=0, description="Seconds to wait for an answer, per try.", examples=[300.0])
    retries: int = Field(
        6,
        ge=0,
        description="Tries after the first one. Status 429 and 5xx, timeouts, cut connections and invalid bodies are "
        "tried again.",
        examples=[3],
    )
    max_wait: float = Field(60.0, gt=0, description="Maximum seconds between two tries.", examples=[30.0])
    give_up_after: int = Field(
        8, ge=1, description="Requests in a row without an answer, after which the job stops.", examples=[20]
    )
    price_in: float = Field(0.0, ge=0, description="Price of a million prompt tokens, for the report.", examples=[0.1])
    price_out: float = Field(
        0.0, ge=0, description="Price of a million generated tokens, for the report.", examples=[0.3]
    )

    @model_validator(mode="after")
    def _usable(self) -> "Endpoint":
        if self.backend == "transformers" and (self.omit or self.extra_body):
            raise ValueError("omit and extra_body are for a server, not for backend 'transformers'")
        if clash := sorted(_OWN_FIELDS & self.extra_body.keys()):
            raise ValueError(f"extra_body: {clash[0]} cannot be set there")
        return self


@dataclass(frozen=True)
class Request:
    """One request. `schema`: the JSON schema of the answer, if the server supports structured output."""

    messages: tuple[tuple[str, str], ...]  # (role, text)
    seed: int = 0
    schema: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    @checked
    def body(self, endpoint: Endpoint) -> dict[str, Any]:
        """All values that the answer depends on.

        It contains the seed even if the seed is not sent, to distinguish attempts.
        """
        sampling = {name: getattr(endpoint, name) for name in ("temperature", "top_p", "max_tokens")}
        return {
            "model": endpoint.model,
            "messages": [{"role": role, "content": text} for role, text in self.messages],
            **{name: value for name, value in sampling.items() if name not in endpoint.omit},
            "seed": self.seed,
            **({"schema": self.schema} if self.schema is not None else {}),
            **({"extra": endpoint.extra_body} if endpoint.extra_body else {}),
        }

    @checked
    def key(self, endpoint: Endpoint) -> str:
        """The sha256 of the body: equal requests to one model have the same key on any server."""
        return hashlib.sha256(json.dumps(self.body(endpoint), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Answer:
    """The answer of a server, with its token counts."""

    text: str
    finish: str = "stop"  # "length": truncated at max_tokens
    prompt_tokens: NotNegative = 0
    completion_tokens: NotNegative = 0
    refusal: str | None = None  # the text of a refusal by the model

    def __post_init__(self) -> None:
        check_fields(self)

    def row(self) -> dict[str, Any]:
        """Return the fields that are stored."""
        return asdict(self)


class MalformedAnswerError(Exception):
    """An answer that cannot be used. `reason` is one of a few texts, which are counted."""

    def __init__(self, reason: str, text: str = "", key: str = ""):
        super().__init__(reason)
        self.reason, self.text, self.key = reason, text, key


@checked
def parse(answer: Answer, kind: type[T]) -> T:
    """The last JSON object of an answer, outside of the model's reasoning, that is a valid `kind`.

    Raises MalformedAnswerError: "empty", "cut off", "refused", "no JSON", "no object", "FIELD missing", "FIELD wrong".
    """
    if answer.refusal is not None:
        raise MalformedAnswerError("refused", answer.refusal)
    found = candidates(answer.text)
    if answer.finish == "length" and (found.unfinished or not found.objects):
        raise MalformedAnswerError("cut off", answer.text)
    if not found.objects:
        if not found.prose:
            raise MalformedAnswerError("empty" if not answer.text.strip() else "no JSON", answer.text)
        raise MalformedAnswerError("no object" if _is_json(found.prose) else "no JSON", answer.text)
    reasons = []
    for value in reversed(found.objects):
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            reasons.append(error.errors()[0])
    last = reasons[0]
    field = str(last["loc"][0]) if last["loc"] else "answer"
    raise MalformedAnswerError(f"{field} {'missing' if last['type'] == 'missing' else 'wrong'}", answer.text)


def _is_json(text: str) -> bool:
    try:
        strict_json.parse(text, "answer")
    except DataError:
        return False
    return True
