"""The folder of a job's parts, beside its output.

OUT.parts/.lock             held by the process, or shared by the tasks, that work here (`data/files.py: locked`)
OUT.parts/manifest.json     sealed: what the parts are made of; another job refuses to go on from them
OUT.parts/output.json       sealed, written by tasks: what `pyqemb finish` needs to know besides the parts
OUT.parts/00000000.*        part 0, see `parts.py`; one that is damaged is made again
"""

import hashlib
import logging
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pyqemb.data.files import atomic_file
from pyqemb.data.machine import unreadable
from pyqemb.data.sealed import seal, unseal
from pyqemb.errors import ConfigError, DataError
from pyqemb.jobs.parts import DamagedPartError, Part

_FORMAT = 1
_TASK = re.compile(r"\.lock\.tasks-([1-9]\d{0,8})\.")  # the lock of a task (`tasks.py`)


def parts_folder(out: Path) -> Path:
    """The folder of the parts of an output."""
    return out.with_name(out.name + ".parts")


def claim(folder: Path, facts: dict[str, Any], *, shared: bool = False) -> str:
    """Start or continue the parts of a job; returns its digest.

    Args:
        folder: the folder of the parts.
        facts: all that the parts depend on, as JSON values.
        shared: other tasks may work in the folder, so its manifest is not replaced even if it holds no parts.

    Raises:
        ConfigError: the parts belong to another job. DataError: the manifest is damaged.
    """
    facts = {name: _plain(value) if isinstance(value, str) else value for name, value in facts.items()}
    manifest, sealed = folder / "manifest.json", seal(facts)
    if manifest.exists():
        before = read_manifest(folder)
        changed = [name for name in facts if before.get(name) != facts[name]]
        if changed and (shared or any(folder.glob("*.npy"))):
            raise ConfigError(
                f"{folder}: holds parts of another job ({changed[0]} was {before.get(changed[0])!r}, now "
                f"{facts[changed[0]]!r}); remove it to start over"
            )
        if not changed:
            return _digest(sealed)
    with atomic_file(manifest) as temporary:
        temporary.write_bytes(sealed)
    return _digest(sealed)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The facts of the job. DataError if the manifest is missing or damaged."""
    return _read(folder, "manifest.json")


def digest_of(facts: dict[str, Any]) -> str:
    """The digest of a job with these facts."""
    return _digest(seal(facts))


def describe_output(folder: Path, kind: str, job: str, settings: dict[str, Any]) -> None:
    """Write how the parts become the output. ConfigError if another task of the job has said something else.

    Args:
        folder: the folder of the parts.
        kind: the verb of the job, e.g. "encode".
        job: the digest of the job.
        settings: the settings of the output, as JSON values.
    """
    path = folder / "output.json"
    facts = {"format": _FORMAT, "kind": kind, "job": job, "settings": settings}
    if path.exists():
        before = _read(folder, "output.json")
        if before == facts:
            return
        if before.get("job") == job and isinstance(old := before.get("settings"), dict):
            changed = next((name for name in settings if old.get(name) != settings[name]), "kind")
            raise ConfigError(
                f"{folder}: another task has {changed} {old.get(changed)!r}, this one {settings.get(changed)!r}; all "
                f"tasks of a job have the same output; remove {path} to change it"
            )
    with atomic_file(path) as temporary:
        temporary.write_bytes(seal(facts))


def read_output(folder: Path, job: str) -> tuple[str, dict[str, Any]]:
    """The kind and the settings of the output that tasks have described.

    ConfigError: no task has ended. DataError: the description is damaged, or that of another job.
    """
    path = folder / "output.json"
    if not path.exists():
        raise ConfigError(f"{folder}: holds no finished work of tasks; run the commands that began it again")
    facts = _read(folder, "output.json")
    kind, settings = facts.get("kind"), facts.get("settings")
    if facts.get("format") != _FORMAT or not isinstance(kind, str) or not isinstance(settings, dict):
        raise DataError(f"{path}: of another version of pyqemb, or damaged")
    if facts.get("job") != job:
        raise DataError(f"{path}: belongs to another job than the parts")
    return kind, settings


def check_complete(folder: Path, parts: Sequence[Part], owner: Callable[[int, int], int] = operator.mod) -> None:
    """DataError that names the missing and the damaged parts of a job, and the tasks that make them.

    `owner` maps the number of a part and the number of tasks to the task of the part.
    """
    missing = []
    for number, part in enumerate(parts):
        try:
            part.verify()
        except DamagedPartError as error:
            missing.append(number)
            if part.started():
                logging.getLogger("pyqemb").warning("%s", error)
    if not missing:
        return
    counts = {int(found[1]) for path in folder.iterdir() if (found := _TASK.match(path.name))}
    again = "run their tasks again"
    if len(counts) == 1:
        count = counts.pop()
        tasks = sorted({owner(number, count) for number in missing})
        again = f"run task{'s' if len(tasks) > 1 else ''} {numbers(tasks)} of {count} again"
    raise DataError(
        f"{folder}: {len(missing)} of {len(parts)} parts are missing or damaged: {numbers(missing)}; {again}"
    )


def numbers(some: Sequence[int], most: int = 8) -> str:
    """Ascending numbers as text, with ranges: "0, 3-5, 9", shortened after `most` of these."""
    runs: list[list[int]] = []
    for number in some:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    shown = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:most]]
    return ", ".join(shown) + (", ..." if len(runs) > most else "")


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        return unseal(path.read_bytes(), str(path))
    except OSError as error:
        raise unreadable(path, error) from error
    except DataError as error:
        raise DataError(f"{error}; remove {folder} to start over") from error


def _digest(sealed: bytes) -> str:
    return hashlib.sha256(sealed).hexdigest()


def _plain(text: str) -> str:
    """The text with escapes for the bytes of a file name that are not UTF-8, which JSON cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode()
