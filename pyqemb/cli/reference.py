"""Documentation generated from the settings classes: pages of the site, run.toml, --help-config.

`python -m pyqemb.cli.reference` writes the pages and the template.
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from pyqemb.data.settings_keys import Key, Table, first_sentence

_ROOT = Path(__file__).parents[2]
_WIDTH = 120
TEMPLATE = Path(__file__).parent / "run.toml"
# Keys that run.toml sets; the others are commented out.
_SET = {
    "task", "stage", "model.base", "data.path", "loss.temperature", "train.seed", "train.epochs",
    "train.global_batch_size", "train.num_negatives", "train.learning_rate", "save.dir",
}  # fmt: skip
_PLACEHOLDERS = {"task": '"@TASK@"', "model.base": '"@MODEL@"'}
_OPTIONAL = {"lora", "teacher", "guide"}  # sections whose presence changes the run
_HEAD = """\
# Configuration of a training run. A commented line shows the default or, for a key that is not set, an example.
#
# pyqemb train run.toml --dry-run              check it and show the plan
# pyqemb train run.toml --set train.seed=1     override a key
# pyqemb train run.toml --resume auto          continue after an interruption
# pyqemb train --help-config train.warmup      explain a key
"""
_PAGES = {
    "configuration": (
        "Configuration of a training run",
        "`pyqemb train run.toml` and `pyqemb.train(config)` take these keys, from TOML, YAML or JSON. `pyqemb init`\n"
        "writes a `run.toml` with all of them, `pyqemb train --help-config KEY` explains one in the terminal, and\n"
        "`pyqemb schema --out run.schema.json` writes a JSON Schema. Editors with the Even Better TOML extension\n"
        "use it if the first line of `run.toml` is `#:schema run.schema.json`. Unknown keys are refused.\n\n"
        "`--set KEY=VALUE` overrides a key, with the value written as in YAML; an item of a list has a number, as in\n"
        "`--set data.0.path=mined.jsonl`. TOML has no null: to turn a key off\n"
        "that is on by default, use `--set loss.margin=null` or a YAML file.",
    ),
    "curation-file": (
        "Configuration of curation",
        "`pyqemb curate curation.toml` and `pyqemb.curate(config)` take these keys; [Curation](../curation.md)\n"
        "explains the steps. `pyqemb schema curate` prints the JSON Schema.",
    ),
    "synthesis-file": (
        "Configuration of synthesis",
        "`pyqemb synthesize synthesis.toml` and `pyqemb.synthesize(config)` take these keys;\n"
        "[Synthesis](../synthesis.md) explains the tasks. `pyqemb schema synthesize` prints the JSON Schema.",
    ),
}


def page(name: str, tables: Sequence[Table]) -> str:
    """The page docs/reference/NAME.md: a section for each table, an entry for each key."""
    title, intro = _PAGES[name]
    parts = [f"# {title}\n\n{intro}\n"]
    for table in tables:
        heading = f"`{table.header}`" if table.header else "Keys outside of tables"
        if table.kind:
            heading = f'`{table.header}` with `kind = "{table.kind}"`'
        parts.append(f"## {heading}\n\n{_prose(table.description)}\n" if table.header else f"## {heading}\n")
        parts += [_entry(key, table) for key in table.keys]
    return "\n".join(parts)


def template(tables: Sequence[Table]) -> str:
    """The run.toml of `pyqemb init`. @TASK@ and @MODEL@ are placeholders for its options."""
    inner = {table.name: table for table in tables if "." in table.name}
    lines = [_HEAD]
    for table in tables:
        if table.name in inner:
            continue
        if table.header:
            mark = "# " if table.name in _OPTIONAL else ""
            lines += ["", *_commented(f"{mark}{table.header}", first_sentence(table.description))]
        for key in table.keys:
            lines += _lines(key, "" if key.name in _SET else "# ")
            if key.name in inner:
                example = inner[key.name]
                lines += [f"#     {line}" for line in (example.header, *chain(*map(_lines, example.keys)))]
    return "\n".join(lines) + "\n"


def explain_keys(tables: Sequence[Table], wanted: str | None) -> str | None:
    """The text of --help-config: all keys, those of a table, or one in full. None if no key is called `wanted`."""
    keys = [key for table in tables for key in table.keys]
    if wanted is None:
        found = keys
    else:
        found = (
            [key for key in keys if wanted in _names(key)]
            or [key for key in keys if key.name.startswith(f"{wanted}.")]
            or [key for key in keys if wanted in (key.last, *key.aliases)]
        )
    if not found:
        return None
    if len(found) > 1:
        width = max(len(key.name) for key in found)
        return "\n".join(f"{key.name:{width}}  {key.summary}" for key in found)
    (key,) = found
    example = f"example: {key.last} = {key.example}" if key.example else ""
    return "\n".join([f"{key.name}: {_facts(key)}", *textwrap.wrap(key.description, 80), *filter(None, [example])])


def _names(key: Key) -> list[str]:
    parent = key.name.removesuffix(key.last)
    return [key.name, *(parent + alias for alias in key.aliases)]


def _facts(key: Key) -> str:
    default = "required" if key.default is None else f"default: {key.default}"
    return "; ".join([key.type, default, *(f"also called {alias}" for alias in key.aliases)])


def _entry(key: Key, table: Table) -> str:
    default = "required" if key.default is None else "not set" if key.default == "not set" else f"`{key.default}`"
    facts = [f"Type: {key.type}", f"Default: {default}", *(f"Also called: `{alias}`" for alias in key.aliases)]
    entry = f"### {key.name}\n\n{'. '.join(facts)}.\n\n{_prose(key.description)}\n"
    if key.example is None:
        return entry
    header = [table.header] if table.header else []
    kind = [f'kind = "{table.kind}"'] if table.kind else []
    return entry + "\n" + "\n".join(["```toml", *header, *kind, f"{key.last} = {key.example}", "```", ""])


def _prose(text: str) -> str:
    """The text wrapped at 100 columns, with links to the pages that it names."""
    linked = re.sub(r"docs/([\w/-]+\.md)", r"[\1](../\1)", text)
    paragraphs = [textwrap.fill(" ".join(part.split()), 100, break_long_words=False) for part in linked.split("\n\n")]
    return "\n\n".join(paragraphs)


def _lines(key: Key, mark: str = "") -> list[str]:
    value = _PLACEHOLDERS.get(key.name)
    value = value or (key.example if key.default in (None, "not set") else key.default)
    return _commented(f"{mark}{key.last} = {value}", key.summary)


def _commented(setting: str, sentence: str) -> list[str]:
    """The setting with its comment after it, or above it if the line would be too long."""
    comment = sentence.removesuffix(".")
    line = f"{setting:34}  # {comment}"
    return [line] if len(line) <= _WIDTH else [f"#   {comment}", setting]


def _texts() -> Iterator[tuple[Path, str]]:
    from pyqemb.cli.schema import settings_class
    from pyqemb.data.settings_keys import tables

    for verb, name in zip(("train", "curate", "synthesize"), _PAGES, strict=True):
        yield _ROOT / "docs" / "reference" / f"{name}.md", page(name, tables(settings_class(verb)))
    yield TEMPLATE, template(tables(settings_class("train")))


if __name__ == "__main__":
    for path, text in _texts():
        path.write_text(text, encoding="utf-8")
        print(path)
