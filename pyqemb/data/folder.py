"""Files of a model folder, which may be untrusted: no file outside of the folder is read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyqemb.data.machine import raise_if_machine
from pyqemb.data.strict_json import parse
from pyqemb.errors import CheckpointError, DataError

_LONGEST_NAME, _LONGEST_PATH = 255, 2048  # bytes

Rule = Callable[[Any], bool]


def member(folder: Path, name: str) -> Path:
    """The path of a file of the folder, whether it exists or not.

    Raises:
        CheckpointError: no file of a model has this name (too long, control characters), or the file is a link out of
            the folder. Such a link is allowed only in the hub's cache, where snapshots/<revision>/file links to
            blobs/<hash>.
    """
    encoded = name.encode("utf-8", "replace")
    if not name.isprintable() or max(map(len, encoded.split(b"/"))) > _LONGEST_NAME or len(encoded) > _LONGEST_PATH:
        raise CheckpointError(f"{folder}: no file can have the name {shown(name)}")
    path, root = folder / name, folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    resolved = path.resolve()
    if not any(resolved.is_relative_to(place) for place in allowed):
        if ".." in Path(name).parts or not path.is_relative_to(folder):
            raise CheckpointError(f"{folder}: may name files of its own folder only, got {shown(name)}")
        raise CheckpointError(f"{path}: is a link that leaves the folder")
    return path


def read_bytes(folder: Path, name: str) -> bytes | None:
    """The content of a file of the folder; None if it does not exist."""
    path = member(folder, name)
    if path.exists() and not path.is_file() and not path.is_dir():  # reading a pipe would wait for its writer
        raise CheckpointError(f"{path}: is a device or a pipe; expected a file")
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise_if_machine(path, error)
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_json(folder: Path, name: str) -> Any:
    """The content of a JSON file of the folder; None if it does not exist."""
    content = read_bytes(folder, name)
    try:
        return None if content is None else parse(content, f"{folder / name}: cannot be read as JSON")
    except DataError as error:
        raise CheckpointError(str(error)) from error


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the folder; empty if it does not exist."""
    value = read_json(folder, name)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{folder / name}: expected a JSON object")
    return value or {}


def check_keys(values: Mapping[str, Any], rules: Mapping[str, Rule | None], where: str | Path) -> None:
    """Check settings: every key needs a rule that accepts its value.

    Args:
        values: the settings, by name.
        rules: the rules of values by key. None: any value, because it changes no result or is checked by its reader.
        where: the file, for the error.

    Raises:
        CheckpointError: an unknown key or unsupported value; the error names file, key and value.
    """
    for key, value in values.items():
        if key not in rules:
            raise CheckpointError(f"{where}: the setting {key!r} is not known, got {shown(value)}")
        rule = rules[key]
        if rule is not None and not rule(value):
            raise CheckpointError(f"{where}: {key} {shown(value)} is not supported")


def one_of(*values: Any) -> Rule:
    """Return the rule that a value is one of these, where 0 is not False and 1 is not True."""
    return lambda value: any(type(value) is type(own) and value == own for own in values)


def shown(value: Any) -> str:
    """Format a value for an error."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
