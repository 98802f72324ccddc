"""Detection of the train, validation and test files of a folder, by the conventions of datasets on the hub.

A split is recognized by a word in a folder's or a file's name (train.jsonl, data/test-00000-of-00001.parquet,
default/dev/0.csv). Source: https://huggingface.co/docs/datasets/repository_structure Additionally, compounds
(trainset.jsonl, devData.csv) and words in camel case (squadTrain.jsonl) are recognized.
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from pyqemb.data.rows import FORMATS, describe_formats, format_of
from pyqemb.errors import DataError

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in KEYWORDS.items() for word in words}
_WORDS = re.compile(r"[-._ 0-9]+")
_COMPOUND = re.compile(rf"({'|'.join(_SPLIT_OF)})(sets?|data|datasets?|splits?|files?|examples|samples|pairs|rows)?")
# In camel case only these words, because HumanEval and DevOps are not splits.
_HUMPS = re.compile(r"(?<=[a-z])(?=[A-Z])")
_IN_CAMEL_CASE = ("train", "training", "test", "testing", "validation")
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-[0-9]{5}-of-[0-9]{5}.*\..*")
# Other files, without rows.
_ABOUT = re.compile(
    r"(readme|license|licence|notice|citation|changelog|authors)(\..*)?|makefile|"
    r".*\.(md|rst|bib|cff|py|png|jpe?g|svg|pdf)|"
    r"dataset_infos?\.json|dataset_dict\.json|croissant\.json",
    re.IGNORECASE,
)


def canonical(split: str) -> str:
    """The canonical name of a split: "validation" for "dev"; an unknown name is not changed."""
    return _SPLIT_OF.get(split.lower(), split)


def split_of(path: Path, shards: bool = False) -> str | None:
    """The split in the names of a path relative to the dataset's folder, or None.

    `shards`: in NAME-00000-of-00001 any NAME is a split, as it always is in a folder `data`.

    Raises DataError if the path names two splits.
    """
    match = _SHARD.fullmatch(path.name)
    if match and (shards or path.parent.name == "data") and not _keywords(path):
        return match[1]
    found = _keywords(path)
    if len(found) > 1:
        raise DataError(f"{path}: is it {' or '.join(sorted(found))}? its name tells both; rename it, or give its path")
    return found.pop() if found else None


def data_files(folder: Path) -> list[Path]:
    """The files of rows in a folder and its subfolders, in order.

    Hidden files and files about the data are skipped.

    Raises a DataError that names a file of another kind.
    """
    files = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(part.startswith((".", "__")) for part in relative.parts) or not path.is_file():
            continue
        if _ABOUT.fullmatch(path.name):
            continue
        if format_of(path) not in FORMATS:
            raise DataError(f"{path}: unknown file in a folder of data; expected {describe_formats()}")
        files.append(path)
    return files


def dataset_files(folder: Path, split: str | None = None) -> list[Path]:
    """The files of one split: train, or the only one, unless `split` names another.

    Raises DataError: no files, a missing split, files of several formats or configurations.
    """
    by_split: dict[str | None, list[Path]] = {}
    for path in data_files(folder):
        by_split.setdefault(split_of(path.relative_to(folder)), []).append(path)
    if not by_split:
        raise DataError(
            f"{folder}: needs qrels/train.tsv beside a corpus and queries (BEIR), or files that end with "
            f"{describe_formats()}; found none"
        )
    if None in by_split and len(by_split) > 1:
        raise DataError(
            f"{by_split[None][0]}: its name has no split, but other files have one ({_names(by_split)}); give the "
            "path of a file"
        )
    files = by_split[None] if set(by_split) == {None} and canonical(split or "train") == "train" else None
    files = files or by_split[choose(folder, {name for name in by_split if name is not None}, split)]
    formats = sorted({format_of(path) for path in files})
    if len(formats) > 1:
        raise DataError(
            f"{folder}: holds files of several formats ({', '.join(formats)}); give the path of one of them"
        )
    stems = [str(path)[: -len(path.suffix)] if format_of(path) != path.suffix.lower() else str(path) for path in files]
    if len(set(stems)) < len(stems):
        twice = next(path for path, stem in zip(files, stems, strict=True) if stems.count(stem) > 1)
        raise DataError(f"{twice}: exists plain and compressed; give the path of one of them")
    configurations = sorted({_configuration(path.relative_to(folder)) for path in files})
    if len(configurations) > 1:
        raise DataError(
            f"{folder}: holds several configurations ({', '.join(map(repr, configurations))}); give the path of one of "
            "them"
        )
    return files


def choose(folder: Path | str, found: Iterable[str], split: str | None, default: str = "train") -> str:
    """Choose among the splits: `split`, else `default`, else the only one, with a warning."""
    names = sorted(found)
    wanted = default if split is None else split
    chosen = [name for name in names if name == wanted] or [n for n in names if canonical(n) == canonical(wanted)]
    if not chosen and split is None and len(names) == 1:
        logging.getLogger("pyqemb").warning("%s: reading split %r, the only one there", folder, names[0])
        return names[0]
    if len(chosen) != 1:
        hint = ""
        if names and split is None:
            of_evaluation = f"evaluate --split {names[0]}, or split = {names[0]!r} in [[eval.datasets]]"
            of_training = f"split = {names[0]!r} in [[data]], or the path of its file"
            hint = f"; choose one: {of_evaluation if default == 'test' else of_training}"
        raise DataError(f"{folder}: no split {wanted!r}; splits found: {', '.join(names) or 'none'}{hint}")
    return chosen[0]


def _keywords(path: Path) -> set[str]:
    """The splits that the words of a path name."""
    words = [word for part in path.parts for word in _WORDS.split(part)]
    humps = [hump.lower() for word in words for hump in _HUMPS.split(word)]
    compounds = filter(None, (_COMPOUND.fullmatch(word.lower()) for word in words))
    return {_SPLIT_OF[match[1]] for match in compounds} | {_SPLIT_OF[hump] for hump in humps if hump in _IN_CAMEL_CASE}


def _configuration(path: Path) -> str:
    """The folders of a path, except `data` and the names of splits."""
    return "/".join(part for part in path.parts[:-1] if part != "data" and not _keywords(Path(part)))


def _names(found: Iterable[str | None]) -> str:
    return ", ".join(sorted(name for name in found if name is not None))
