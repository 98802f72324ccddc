"""The README.md and the pyqemb.json of a model folder, and its other JSON files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyqemb import __version__


def model_card(name: str, task: str, tags: Sequence[str], body: str, provenance: Mapping[str, Any]) -> str:
    """Return the text of a model card for the hub.

    Args:
        name: the name of the model.
        task: the hub's pipeline_tag.
        tags: further tags.
        body: Markdown with a description of the model and its usage.
        provenance: the origin of the model, and its "results" by metric.
    """
    lines = "".join(f"- {tag}\n" for tag in ("sentence-transformers", *tags, "pyqemb"))
    return f"""---
library_name: sentence-transformers
pipeline_tag: {task}
{_base_model_line(provenance)}tags:
{lines}---
# {name}

{body}{_provenance_section(provenance)}"""


def contract(
    digests: Mapping[str, str], provenance: Mapping[str, Any] | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of pyqemb.json: properties of the model, the digests of its weight files, its origin."""
    return {"pyqemb_version": __version__, **facts, "sha256": dict(digests), "provenance": dict(provenance or {})}


def write_json_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Write each content under its name inside the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _base_model_line(provenance: Mapping[str, Any]) -> str:
    """The line of the base model if it is a model on the hub."""
    base = str(provenance.get("base") or "")
    return f"base_model: {base}\n" if base.count("/") == 1 and not base.startswith((".", "/", "~")) else ""


def _provenance_section(provenance: Mapping[str, Any]) -> str:
    """The origin of a model, and its evaluation results."""
    facts = {key: value for key, value in provenance.items() if key not in ("results", "data") and value is not None}
    results = provenance.get("results") or {}
    lines = (f"- {key.replace('_', ' ')}: `{value}`\n" for key, value in facts.items())
    text = "\n## Provenance\n\n" + "".join(lines) if facts else ""
    if results:
        rows = "".join(f"| {name} | {value:.4f} |\n" for name, value in results.items())
        text += "\n## Results\n\nOn the evaluation data of the training run:\n\n"
        text += f"| metric | value |\n| --- | ---: |\n{rows}"
    return text
