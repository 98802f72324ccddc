"""Files of a model folder, which may come from a stranger: none of them is read from outside the folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyqemb.data.machine import raise_if_machine
from pyqemb.data.strict_json import parse
from pyqemb.errors import CheckpointError, DataError

Rule = Callable[[Any], bool]


def member(folder: Path, name: str) -> Path:
    """The path of a file of the folder, whether it exists or not.

    Raises:
        CheckpointError: the file is a link that leaves the folder. Only the hub's cache may do that:
            snapshots/<revision>/file links to blobs/<hash>.
    """
    path, root = folder / name, folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    resolved = path.resolve()
    if not any(resolved.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path}: is a link that leaves the folder")
    return path


def read_bytes(folder: Path, name: str) -> bytes | None:
    """The content of a file of the folder; None where there is no such file."""
    path = member(folder, name)
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise_if_machine(path, error)
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_json(folder: Path, name: str) -> Any:
    """A JSON file of the folder; None where there is no such file."""
    content = read_bytes(folder, name)
    try:
        return None if content is None else parse(content, f"{folder / name}: cannot be read as JSON")
    except DataError as error:
        raise CheckpointError(str(error)) from error


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of the folder; empty where there is no such file."""
    value = read_json(folder, name)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{folder / name}: expected a JSON object")
    return value or {}


def check_keys(values: Mapping[str, Any], rules: Mapping[str, Rule | None], where: str | Path) -> None:
    """Refuse what is not understood: every key needs a rule that accepts its value.

    Args:
        values: the settings, by name.
        rules: by name what a value must fulfill. None: any value, which changes no result or is checked by its reader.
        where: the file, for the error.

    Raises:
        CheckpointError: names file, key and value.
    """
    for key, value in values.items():
        if key not in rules:
            raise CheckpointError(f"{where}: the setting {key!r} is not known, got {shown(value)}")
        rule = rules[key]
        if rule is not None and not rule(value):
            raise CheckpointError(f"{where}: {key} {shown(value)} is not supported")


def one_of(*values: Any) -> Rule:
    """Return a rule: the value is one of these, where 0 is not False and 1 is not True."""
    return lambda value: any(type(value) is type(own) and value == own for own in values)


def shown(value: Any) -> str:
    """A value in an error."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
