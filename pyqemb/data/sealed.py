"""JSON files with their own digest, which is verified when they are read."""

import hashlib
import json
from typing import Any

from pyqemb.data.strict_json import parse
from pyqemb.errors import DataError


def seal(value: dict[str, Any]) -> bytes:
    """The value as JSON, with its sha256 under "sha256"."""
    return _canonical({**value, "sha256": hashlib.sha256(_canonical(value)).hexdigest()})


def unseal(raw: bytes, where: str) -> dict[str, Any]:
    """The sealed value. DataError if the digest does not match."""
    value = parse(raw, where)
    if isinstance(value, dict):
        value.pop("sha256", None)
        if raw == seal(value):
            return value
    raise DataError(f"{where}: damaged: it does not match its own checksum")


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"
