"""The configuration of a pipeline from Python or a TOML file: inputs, output, and the steps in order."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from pyqemb.curation.decontaminate import Decontaminate
from pyqemb.curation.dedup import Exact, Near
from pyqemb.curation.rank import Consistency, Rank
from pyqemb.curation.relabel import Relabel
from pyqemb.curation.similarity import Similarity
from pyqemb.curation.text import Language, Length
from pyqemb.data.example import Example
from pyqemb.data.settings import Settings

AnyStep = Annotated[
    Length | Language | Exact | Near | Similarity | Consistency | Rank | Decontaminate | Relabel,
    Field(discriminator="kind"),
]


class CurateConfig(Settings):
    """The configuration of a curation: inputs, output, and the steps in their order."""

    input: list[Any] = Field(
        min_length=1,
        description="File, folder or dataset on the Hub (hub://ORG/NAME), or a list of them. In Python also "
        "tables and lists in memory.",
        examples=[["pairs.jsonl", "synthetic/examples.jsonl"]],
        json_schema_extra={"items": {"type": "string"}},
    )
    split: str | None = Field(
        None, description="Split of folders and Hub datasets (default: train, or the only split).", examples=["train"]
    )
    columns: dict[str, str | tuple[str, ...]] | None = Field(
        None,
        description="Columns of the rows, by the names of pyqemb (default: by their own names). `ignore` lists columns "
        "that are not read.",
        examples=[{"query": "question", "ignore": ["id"]}],
    )
    out: Path = Field(description="Folder of the results.", examples=["curated"])
    step: list[AnyStep] = Field(min_length=1)
    samples: int = Field(20, ge=0, description="Examples of each outcome of each step in the report.", examples=[5])
    seed: int = Field(0, description="Seed of the samples in the report.", examples=[0])

    @field_validator("input", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        several = isinstance(value, list | tuple) and not any(isinstance(item, dict | Example) for item in value)
        return value if several else [value]
