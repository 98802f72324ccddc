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
from pyqemb.data.settings import Settings

AnyStep = Annotated[
    Length | Language | Exact | Near | Similarity | Consistency | Rank | Decontaminate | Relabel,
    Field(discriminator="kind"),
]


class CurateConfig(Settings):
    """`input`: one or several files or folders of examples, read one after the other.

    `out`: the folder of the results.
    """

    input: list[Path] = Field(min_length=1)
    out: Path
    step: list[AnyStep] = Field(min_length=1)
    samples: int = Field(20, ge=0)  # of each outcome of each step, in the report
    seed: int = 0

    @field_validator("input", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, Path)) else value
