"""Steps that use only the text: length and language."""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field, model_validator

from pyqemb.curation.ledger import Ledger
from pyqemb.curation.steps import Side, Step
from pyqemb.data.example import Example
from pyqemb.errors import ConfigError


class Length(Step):
    """Keep pairs whose query and positive have an allowed length, in characters without surrounding spaces.

    A pair whose query and positive are the same text is dropped unless `allow_identical` is set.
    """

    kind: Literal["length"] = "length"
    min_query: int = Field(1, ge=0, description="Minimum characters of the query.", examples=[10])
    max_query: int | None = Field(
        None, ge=1, description="Maximum characters of the query (default: no limit).", examples=[1000]
    )
    min_positive: int = Field(1, ge=0, description="Minimum characters of the positive.", examples=[20])
    max_positive: int | None = Field(
        None, ge=1, description="Maximum characters of the positive (default: no limit).", examples=[8000]
    )
    allow_identical: bool = Field(
        False, description="Keep pairs whose query and positive are the same text.", examples=[True]
    )

    @model_validator(mode="after")
    def _ordered(self) -> "Length":
        for side in ("query", "positive"):
            low, high = getattr(self, f"min_{side}"), getattr(self, f"max_{side}")
            if high is not None and low > high:
                raise ValueError(f"min_{side} must not be above max_{side}, got {low} and {high}")
        return self

    def run(self, examples: Iterable[Example], ledger: Ledger) -> Iterator[Example]:
        """Yield the examples whose query and positive have an allowed length, in order."""
        for example in examples:
            query, positive = example.query.strip(), example.positive.strip()
            reason = self._reason("query", len(query)) or self._reason("positive", len(positive))
            if reason is None and query == positive and not self.allow_identical:
                reason = "the positive is the query"
            if ledger.judge(example, reason, query_length=len(query), positive_length=len(positive)):
                yield example

    def _reason(self, side: Side, length: int) -> str | None:
        low, high = getattr(self, f"min_{side}"), getattr(self, f"max_{side}")
        if length < low:
            return f"{side} shorter than {low}"
        return f"{side} longer than {high}" if high is not None and length > high else None


class Language(Step):
    """Keep examples in the listed languages, as detected by py3langid.

    A text with fewer than `min_letters` letters, or whose detected language has a confidence below `min_confidence`,
    counts as being in a listed language.
    """

    kind: Literal["language"] = "language"
    languages: list[str] = Field(
        min_length=1, description="Languages that are kept, as ISO 639-1 codes.", examples=[["en", "de"]]
    )
    sides: list[Side] = Field(
        ["query", "positive"], min_length=1, description="Texts of an example that are checked.", examples=[["query"]]
    )
    min_letters: int = Field(20, ge=0, description="Letters below which a text is kept without a check.", examples=[50])
    min_confidence: float = Field(
        0.8, ge=0, le=1, description="Confidence of the detector below which a text is kept.", examples=[0.9]
    )

    def run(self, examples: Iterable[Example], ledger: Ledger) -> Iterator[Example]:
        """Yield the examples in the listed languages, in order."""
        identifier, wanted = _identifier(), set(self.languages)
        if unknown := wanted - set(identifier.labels):
            raise ConfigError(f"languages: {sorted(unknown)[0]!r} is not a language of py3langid, e.g. 'en'")
        for example in examples:
            reason = None
            for side in self.sides:
                text = getattr(example, side)
                if sum(map(str.isalpha, text)) < self.min_letters:
                    continue
                language, confidence = identifier.classify(text)
                if language not in wanted and confidence >= self.min_confidence:
                    reason = f"{side} in {language}"
                    break
            if ledger.judge(example, reason):
                yield example


def language_of(text: str) -> str:
    """The language of a text, as an ISO 639-1 code, detected by py3langid."""
    return _identifier().classify(text)[0]


@lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError as error:
        raise ConfigError("the language step needs py3langid: pip install 'pyqemb[data]'") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
