"""The kinds of examples that can be requested, and the formats of the answers."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, StringConstraints, model_validator

QUESTION_TYPES = {
    "keywords": "a few words as typed into a search box, no sentence",
    "acquire_knowledge": "a question by somebody who wants to learn or to solve something",
    "summary": "a request for what the passage as a whole says on a subject",
    "yes_or_no": "a question that is answered by yes or no",
    "background": "a description of a situation or of what is known, for which the passage gives what is missing",
}
DIFFICULTIES = ("high_school", "university", "phd")
TASKS = ("retrieval", "bitext", "sts", "classification")
SCORES = {
    "0": "nothing in common", "1": "only the subject in common", "2": "not the same, with some details in common",
    "3": "about the same, with important information different or missing",
    "4": "the same but for details that do not matter", "5": "the same in other words",
}  # fmt: skip
Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Reply(BaseModel):
    """A JSON answer. Keys may be written in any case, as models do."""

    @model_validator(mode="before")
    @classmethod
    def _any_case(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {str(key).strip().lower().replace(" ", "_"): value for key, value in values.items()}

    @classmethod
    def schema_of_answer(cls) -> dict[str, Any]:
        """The JSON schema for structured output: all fields are required, and no others are allowed."""
        return {**cls.model_json_schema(), "additionalProperties": False}


class Configuration(Reply):
    character: Words
    question_type: Literal["keywords", "acquire_knowledge", "summary", "yes_or_no", "background"]
    difficulty: Literal["high_school", "university", "phd"]


class Query(Reply):
    query: Words


class Passage(Reply):
    passage: Words


class Translation(Reply):
    translation: Words


class Sentences(Reply):
    sentence1: Words
    sentence2: Words


class Labelled(Reply):
    task: Words
    text: Words
    label: Words
    wrong_labels: list[Words]
