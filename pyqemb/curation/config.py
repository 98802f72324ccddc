"""The configuration of a pipeline: inputs, output, and the steps in their order, from Python or a TOML file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pyqemb.curation.decontaminate import Decontaminate
from pyqemb.curation.dedup import Exact, Near
from pyqemb.curation.rank import Consistency, Rank
from pyqemb.curation.relabel import Relabel
from pyqemb.curation.similarity import Similarity
from pyqemb.curation.text import Language, Length
from pyqemb.errors import ConfigError

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib  # type: ignore[no-redef]

AnyStep = Annotated[
    Length | Language | Exact | Near | Similarity | Consistency | Rank | Decontaminate | Relabel,
    Field(discriminator="kind"),
]


class CurateConfig(BaseModel):
    """`input`: one or several files or folders of examples, read one after the other. `out`: the folder of the results."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    input: list[Path] = Field(min_length=1)
    out: Path
    step: list[AnyStep] = Field(min_length=1)
    samples: int = Field(20, ge=0)  # of each outcome of each step, in the report
    seed: int = 0

    @field_validator("input", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, Path)) else value

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError("; ".join(map(_explain, error.errors()))) from error


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> CurateConfig:
    """Read a TOML file; `overrides` replace its top-level keys. Paths in it are relative to where the command runs.

    Raises ConfigError naming the file and the key.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        return CurateConfig(**{**values, **(overrides or {})})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "configuration"
    if error["type"] == "missing":
        return f"{where}: missing"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message[:1].lower()}{message[1:]}, got {error['input']!r}"
