"""The public functions, classes and methods, and those that need no record."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pyqemb

# Public, and nothing that callers give arguments to.
RESULTS = {
    "Adapter",
    "AttentionPlan",
    "Check",
    "Curated",
    "EncodePlan",
    "Example",
    "Filtered",
    "LossPart",
    "MalformedAnswerError",
    "MergeReport",
    "Mined",
    "MiningPlan",
    "MiningTask",
    "Section",
    "SweepReport",
    "SweepRun",
    "Synthesis",
    "Synthesis.report",
    "TrainInfo",
    "TrainResult",
}


# The trainer calls them: hooks and methods that users override, and the parts of losses.
HOOKS = ("Callback.", "StepFunction.", "RowLogger", "Objective.", "zero_of", "number", "positive_totals")


# Methods that the jobs of pyqemb call on each other, as in tests/docs/test_docstrings.py.
INTERNAL = {
    "check_dim",
    "encode_windows",
    "token_counts",
    "encoding_on",
    "in_processes",
    "load_rows",
    "save_parameters",
    "without_weights",
    "write_portable",
    "overridden",
    "uses_average",
}


# Any value is data, and the functions that read it check it.
ANY = {"as_data"}


# mteb calls their methods; tests/interop/test_mteb.py makes the broken calls of the rest.
MTEB = "interop.mteb."


def key_of(item: Any) -> str:
    """The module and the name of a function, class or method, the same for all places that show it."""
    function = inspect.unwrap(item)
    return f"{function.__module__.removeprefix('pyqemb.')}.{function.__qualname__}"


def is_exempt(key: str, item: Any) -> bool:
    name = key.rpartition(".")[2]
    short = key[re.match(r"[a-z_.0-9]*", key).end() :] or name  # "Callback.on_save" of a class, "merge" of a module
    kinds = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
    parameters = [
        each for each in inspect.signature(item).parameters.values() if each.name != "self" and each.kind not in kinds
    ]
    return (
        key.startswith(MTEB)
        or short in RESULTS
        or short.startswith(HOOKS)
        or name in INTERNAL | ANY
        or not (parameters or key.endswith(("stage1", "stage2")))
    )


def public_names() -> dict[str, Any]:
    """Every public function, class and method: what the packages list and what docs/reference shows."""
    root = Path(pyqemb.__file__).parents[1]
    found: dict[str, Any] = {}
    for home in ("pyqemb", "ops", "curation", "encoding", "evaluation", "llm", "merging", "synthesis", "training"):
        module = pyqemb if home == "pyqemb" else importlib.import_module(f"pyqemb.{home}")
        names = getattr(module, "__all__", None) or [
            name for name, item in vars(module).items() if not name.startswith("_") and hasattr(item, "__qualname__")
        ]
        found |= {f"{home}.{name}": getattr(module, name) for name in names if name != "__version__"}
    for page in ("models", "ops", "training"):
        for line in (root / "docs" / "reference" / f"{page}.md").read_text().splitlines():
            if line.startswith(":::"):
                found |= documented(line.removeprefix(":::").strip())
    for name, item in list(found.items()):
        if inspect.isclass(item) and not issubclass(item, Exception | tuple):
            for method, member in inspect.getmembers(item, inspect.isroutine):
                if not method.startswith("_") and (member.__module__ or "").startswith("pyqemb."):
                    found[f"{name}.{method}"] = member
    return {key_of(item): item for item in found.values()}


def documented(target: str) -> dict[str, Any]:
    """What an entry `::: pyqemb.x.y` shows: an object, or the public names of a module."""
    try:
        module = importlib.import_module(target)
    except ModuleNotFoundError:
        home, _, name = target.rpartition(".")
        return {target.removeprefix("pyqemb."): getattr(importlib.import_module(home), name)}
    short = target.removeprefix("pyqemb.")
    return {
        f"{short}.{name}": item
        for name, item in vars(module).items()
        if not name.startswith("_") and getattr(item, "__module__", "") == target and callable(item)
    }
