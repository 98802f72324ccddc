"""The base class of curation steps: generators that keep or drop examples and count the reasons."""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from pyqemb.curation.ledger import Ledger
from pyqemb.data.example import Example
from pyqemb.data.settings import StrictModel
from pyqemb.model.protocols import QueryDocumentEncoder

Side = Literal["query", "positive"]
WINDOW = 4096  # examples processed together

Instruction = Annotated[
    str | None,
    Field(
        description="Instruction for queries without their own (default: none).",
        examples=["Given a question, retrieve passages that answer it"],
    ),
]


def model_field(use: str, default: Any = ...) -> Any:
    """The setting of an embedding model; `use` describes its purpose in one sentence."""
    return Field(
        default,
        description=f"{use} A folder or a hub id; in Python also an object with `encode_query` and `encode_document`.",
        examples=["my-embedder"],
        json_schema_extra={"type": "string"},
    )


class Step(StrictModel):
    """A step: its settings, and `run`.

    A `model` is a folder or hub id, or an object with encode_query and encode_document.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    kind: str

    @field_validator("model", check_fields=False)
    @classmethod
    def _is_model(cls, model: Any) -> Any:
        if not isinstance(model, str | Path | QueryDocumentEncoder | None):
            raise ValueError("expected a folder, a hub id or an object with encode_query and encode_document")
        return model

    def run(self, examples: Iterable[Example], ledger: Ledger) -> Iterator[Example]:
        """Yield the kept examples in order; every example is recorded in `ledger`."""
        raise NotImplementedError


def encoder(model: Any) -> Any:
    """The model itself, or the model of that name, opened once for all steps."""
    from pyqemb.model.encoder import unit_encoder

    return unit_encoder(_opened(str(model)) if isinstance(model, (str, Path)) else model)


@lru_cache(maxsize=2)
def _opened(name: str) -> Any:
    from pyqemb.model.encoder import open_encoder

    return open_encoder(name)
