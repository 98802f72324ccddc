"""Code search over the installed Python libraries.

The query is the first paragraph of a docstring, and the positive is the function's source without the docstring.

Files are parsed with `ast`, never imported or run. The split is by file: held-out files give no training pairs.
"""

import ast
import importlib.util
import re
import sysconfig
import textwrap
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyqemb.data.example import Example
from pyqemb.demo.material import Document, Material, Question, halves, neighbours, sample, untouched
from pyqemb.errors import DataError

LIBRARIES = ("stdlib", "torch", "numpy", "transformers")
_HELD_OUT = 12  # every 12th file
_FILES = 300  # maximum per library; transformers alone has thousands
_WEAK_PAIRS = 34_000
_LONGEST = 4_000  # characters; longer sources are truncated, because they far exceed the model's maximum length
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


@dataclass(frozen=True, slots=True)
class Function:
    """One documented function; `source` does not contain its docstring."""

    library: str
    file: str
    name: str
    summary: str
    source: str


def python_material(*, seed: int = 0, files: int = _FILES) -> Material:
    """The installed libraries as Material, at most `files` files of each."""
    functions = [function for library in LIBRARIES for function in functions_of_library(library, files)]
    if not functions:
        raise DataError("no documented function was found in the installed Python")
    train = [function for function in functions if not _is_held_out(function)]
    dev = [function for function in functions if _is_held_out(function)]
    answers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for function in functions:
        answers[function.library, function.summary].add(function.source)
    asked = dict.fromkeys((function.library, function.summary) for function in dev)
    held_out = {text for function in dev for text in (function.summary, function.source)}
    copied = {function.source for function in train} & held_out
    train = [function for function in train if function.source not in held_out]
    supervised = untouched((Example(f.summary, f.source, task=f.library) for f in train), held_out)
    return Material(
        name="python",
        texts=list(dict.fromkeys(text for f in train for text in (f.summary, f.source) if text not in held_out)),
        weak=untouched(weak_pairs(train, seed=seed), held_out),
        supervised=supervised,
        questions=[Question(group, text, frozenset(answers[group, text])) for group, text in asked],
        corpora={"held-out files": _documents(dev), "all files": _documents([*dev, *train])},
        groups=tuple(library for library in LIBRARIES if any(function.library == library for function in dev)),
        facts={
            "training files": len({function.file for function in train}),
            "training functions": len(train),
            "held-out files": len({function.file for function in dev}),
            "held-out functions": len(dev),
            "sources on both sides, left out of training": len(copied),
        },
    )


def weak_pairs(functions: Sequence[Function], *, seed: int) -> list[Example]:
    """Pairs without docstrings: name -> source, half -> half, neighboring functions of a file."""
    names = [Example(words_of(function.name), function.source, task="name") for function in functions]
    files: dict[str, list[str]] = defaultdict(list)
    for function in functions:
        files[function.file].append(function.source)
    kinds = names, list(halves(function.source for function in functions)), list(neighbours(files.values(), seed=seed))
    return [pair for kind in kinds for pair in sample(kind, _WEAK_PAIRS, seed=seed)]


def functions_of(code: str, *, library: str, file: str) -> Iterator[Function]:
    """The documented functions and methods of one file; none if it cannot be parsed."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = code.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if not docstring or len(node.body) < 2:
            continue
        summary = " ".join(docstring.split("\n\n")[0].split())
        first = node.body[0]
        # In a one-line body the docstring shares its line with other code, so it cannot be removed.
        if len(summary) < 20 or first.lineno <= node.lineno or node.body[1].lineno <= (first.end_lineno or 0):
            continue
        kept = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
        source = textwrap.dedent("\n".join(line for line in kept if line.strip()))
        yield Function(library, file, node.name, summary[:400], source[:_LONGEST])


def words_of(name: str) -> str:
    """`read_HTTPHeader2` -> `read http header 2`."""
    return " ".join(word.lower() for word in _WORD.findall(name)) or name


def functions_of_library(library: str, files: int) -> Iterator[Function]:
    """The documented functions of at most `files` files of an installed library, chosen by a hash of their paths."""
    root = _root(library)
    if root is None:
        return
    paths = [path for path in root.rglob("*.py") if not _SKIPPED & set(path.relative_to(root).parts[:-1])]
    for path in sorted(paths, key=lambda path: _hash(str(path.relative_to(root))))[:files]:
        try:
            code = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # a few library files are intentionally not UTF-8
        yield from functions_of(code, library=library, file=f"{library}/{path.relative_to(root)}")


def _root(library: str) -> Path | None:
    if library == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    found = importlib.util.find_spec(library)
    return Path(found.origin).parent if found is not None and found.origin else None


def _is_held_out(function: Function) -> bool:
    return _hash(function.file) % _HELD_OUT == 0


def _hash(text: str) -> int:
    """A hash that is the same on every machine and in every run."""
    return zlib.crc32(text.encode())


def _documents(functions: Sequence[Function]) -> list[Document]:
    return [Document(function.source, f"{function.file}: {function.name}") for function in functions]
