"""The configuration of a pipeline: inputs, output, and the steps in their order, from Python or a TOML file."""

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
    """`input`: one or several sources of examples, as for `read_examples`, read one after the other.

    `split` and `columns` are for all of them. `out`: the folder of the results.
    """

    input: list[Any] = Field(min_length=1)
    split: str | None = None
    columns: dict[str, str | tuple[str, ...]] | None = None
    out: Path
    step: list[AnyStep] = Field(min_length=1)
    samples: int = Field(20, ge=0)  # of each outcome of each step, in the report
    seed: int = 0

    @field_validator("input", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        several = isinstance(value, list | tuple) and not any(isinstance(item, dict | Example) for item in value)
        return value if several else [value]
