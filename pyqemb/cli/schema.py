"""`pyqemb schema`: the JSON Schema of a configuration file, with which editors complete keys and mark mistakes."""

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

SETTINGS = {
    "train": ("pyqemb.training.config", "TrainConfig"),
    "curate": ("pyqemb.curation.config", "CurateConfig"),
    "synthesize": ("pyqemb.synthesis.config", "SynthesisConfig"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "of",
        choices=[*SETTINGS],
        nargs="?",
        default="train",
        help="the command whose configuration file the schema describes (default: train)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it to a file instead of standard output")


def run(args: argparse.Namespace) -> int:
    import json

    from pyqemb.data.files import atomic_file
    from pyqemb.data.settings_keys import json_schema

    text = json.dumps(json_schema(settings_class(args.of)), indent=2)
    if args.out is None:
        print(text)
        return 0
    with atomic_file(args.out) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(f"written to {args.out}")
    return 0


def settings_class(verb: str) -> Any:
    """The class of a verb's configuration file."""
    module, name = SETTINGS[verb]
    return getattr(import_module(module), name)
