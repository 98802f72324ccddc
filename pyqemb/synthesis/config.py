"""The configuration of a synthesis, from Python or a TOML file.

It names the passages, the model, the tasks, and what is drawn for each example.
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator

from pyqemb.data.settings import Settings
from pyqemb.llm import Endpoint
from pyqemb.synthesis.kinds import DIFFICULTIES, QUESTION_TYPES, TASKS


def _weights(shares: dict[str, float]) -> dict[str, float]:
    if not shares or min(shares.values()) < 0 or sum(shares.values()) <= 0:
        raise ValueError("expected at least one name with a weight above 0")
    return shares


Shares = Annotated[dict[str, float], AfterValidator(_weights)]  # name -> weight; they need not add up to 1


class Personas(Settings):
    """The personas that queries are written for.

    `file` holds one description a line, or JSONL with `persona`. With a `model`, each passage is offered the `top`
    personas most relevant to it, as in the report; without one, `top` personas drawn at random.
    """

    file: Path
    model: str | None = None
    top: int = Field(5, ge=1)


class SynthesisConfig(Settings):
    """The configuration of a synthesis.

    `passages` is JSONL with `text` (and `title`, `language`), a BEIR corpus folder, examples (their positives), or
    plain text, one a line.
    """

    passages: Path
    out: Path
    endpoint: Endpoint
    personas: Personas | None = None  # None: anyone
    tasks: Shares = Field({"retrieval": 1.0})
    languages: Shares = Field({"English": 1.0})  # of the query, the translation, the sentences
    lengths: Shares = Field({"3 to 8": 1.0, "8 to 15": 1.0, "15 to 30": 0.5})  # words
    types: Shares = dict.fromkeys(QUESTION_TYPES, 1.0)
    difficulties: Shares = dict.fromkeys(DIFFICULTIES, 1.0)
    scores: Shares = dict.fromkeys("012345", 1.0)  # of sts pairs
    negatives: int = Field(
        0, ge=0
    )  # hard negatives of a retrieval pair; wrong labels of a classification are `wrong_labels`
    wrong_labels: int = Field(3, ge=1)
    per_passage: int = Field(1, ge=1)  # examples
    limit: int | None = Field(None, ge=1)  # passages
    min_characters: int = Field(50, ge=1)  # shorter passages are left out
    max_characters: int = Field(4000, ge=1)  # longer ones are cut at a space
    attempts: int = Field(2, ge=1)  # a malformed answer is asked again with another seed
    instruction: str | None = (
        "Given a web search query, retrieve relevant passages that answer the query"  # of retrieval
    )
    seed: int = 0

    @field_validator("tasks", "types", "difficulties", "scores")
    @classmethod
    def _known(cls, shares: dict[str, float], info: Any) -> dict[str, float]:
        known = {"tasks": TASKS, "types": QUESTION_TYPES, "difficulties": DIFFICULTIES, "scores": tuple("012345")}[
            info.field_name
        ]
        if unknown := [name for name in shares if name not in known]:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return shares


def draw(shares: Mapping[str, float], generator: random.Random) -> str:
    """Draw one name in proportion to its weight."""
    return generator.choices(list(shares), list(shares.values()))[0]
