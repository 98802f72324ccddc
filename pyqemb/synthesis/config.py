"""The configuration of a synthesis, from Python or a TOML file.

It defines the passages, the model, the tasks, and the random choices for each example.
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

    Without this section, queries are written for no particular persona.
    """

    file: Path = Field(
        description="File of personas: one description per line, or JSONL with `persona`.",
        examples=["personas.jsonl"],
    )
    model: str | None = Field(
        None,
        description="Embedding model that selects the personas most relevant to a passage (default: a random choice).",
        examples=["my-embedder"],
    )
    top: int = Field(5, ge=1, description="Number of personas offered for a passage.", examples=[5])


class SynthesisConfig(Settings):
    """The configuration of a synthesis: passages, model, tasks, and the weights of what is drawn for each example."""

    passages: Path = Field(
        description="Passages to write examples for. JSONL with `text` (and `title`, `language`), a BEIR folder, "
        "examples (their positives), Parquet, or plain text with one passage per line.",
        examples=["corpus.jsonl"],
    )
    out: Path = Field(description="Folder of the results.", examples=["synthetic"])
    endpoint: Endpoint
    personas: Personas | None = None
    tasks: Shares = Field(
        {"retrieval": 1.0},
        description="Weights of the tasks: retrieval, bitext, sts, classification.",
        examples=[{"retrieval": 3, "sts": 1}],
    )
    languages: Shares = Field(
        {"English": 1.0},
        description="Weights of the languages of queries, translations and sentences.",
        examples=[{"English": 2, "German": 1}],
    )
    lengths: Shares = Field(
        {"3 to 8": 1.0, "8 to 15": 1.0, "15 to 30": 0.5},
        description="Weights of the query lengths, in words.",
        examples=[{"3 to 8": 1, "8 to 15": 1}],
    )
    types: Shares = Field(
        dict.fromkeys(QUESTION_TYPES, 1.0),
        description="Weights of the question types. With equal weights the model chooses; otherwise one is drawn.",
        examples=[{"keywords": 2, "yes_or_no": 1}],
    )
    difficulties: Shares = Field(
        dict.fromkeys(DIFFICULTIES, 1.0),
        description="Weights of the difficulties. With equal weights the model chooses; otherwise one is drawn.",
        examples=[{"high_school": 1, "university": 1}],
    )
    scores: Shares = Field(
        dict.fromkeys("012345", 1.0),
        description="Weights of the similarity scores of sts pairs, 0 to 5.",
        examples=[{"0": 1, "3": 1, "5": 1}],
    )
    negatives: int = Field(0, ge=0, description="Hard negatives per retrieval pair.", examples=[1])
    wrong_labels: int = Field(3, ge=1, description="Wrong labels per classification example.", examples=[3])
    per_passage: int = Field(1, ge=1, description="Examples per passage.", examples=[2])
    limit: int | None = Field(None, ge=1, description="Maximum number of passages (default: all).", examples=[1000])
    min_characters: int = Field(50, ge=1, description="Minimum characters of a passage.", examples=[100])
    max_characters: int = Field(
        4000,
        ge=1,
        description="Maximum characters of a passage. Longer ones are truncated at a space.",
        examples=[2000],
    )
    attempts: int = Field(
        2, ge=1, description="Requests with different seeds until an answer is well formed.", examples=[3]
    )
    instruction: str | None = Field(
        "Given a web search query, retrieve relevant passages that answer the query",
        description="Instruction of retrieval examples.",
        examples=["Given a question, retrieve passages that answer it"],
    )
    seed: int = Field(0, description="Seed of all random choices.", examples=[0])

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
