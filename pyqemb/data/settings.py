"""Settings out of TOML: unknown keys refused, every error in a user's words."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pyqemb.errors import ConfigError

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib  # type: ignore[no-redef]

S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """Frozen. ConfigError names the key that is missing, unknown or wrong, and what was given."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True, protected_namespaces=())

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError("; ".join(map(_explain, error.errors()))) from error

    @classmethod
    def from_toml(cls: type[S], path: str | Path, overrides: Mapping[str, Any] | None = None) -> S:
        """Read a file; `overrides` replace its top-level keys. Paths in it are relative to where the command runs."""
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from error
        try:
            return cls(**{**values, **(overrides or {})})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "configuration"
    if error["type"] in ("missing", "extra_forbidden"):
        return f"{where}: {'missing' if error['type'] == 'missing' else 'unknown key'}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message[:1].lower()}{message[1:]}, got {error['input']!r}"
