"""Prompts in TOML files with `system` and `user`, which may contain $names to fill in."""

from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from string import Template
from typing import Any

from pyqemb.data.settings import tomllib


def prompt(package: str, name: str, fields: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The messages of `prompts/NAME.toml` of a package, as (role, text)."""
    system, user = _read(package, name)
    return ("system", system), ("user", user.substitute({key: str(value) for key, value in fields.items()}))


@lru_cache
def _read(package: str, name: str) -> tuple[str, Template]:
    values = tomllib.loads(files(package).joinpath(f"prompts/{name}.toml").read_text(encoding="utf-8"))
    return values["system"], Template(values["user"].strip())
