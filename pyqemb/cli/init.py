"""`pyqemb init FOLDER`: write a commented run.toml."""

import argparse
from pathlib import Path

from pyqemb.cli.reference import TEMPLATE as _TEMPLATE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path(), help="folder for run.toml (default: the current one)"
    )
    parser.add_argument(
        "--model",
        default="Qwen/Qwen3-0.6B-Base",
        help="base model: a folder or a hub id (default: Qwen/Qwen3-0.6B-Base)",
    )
    parser.add_argument(
        "--task", choices=["embedding", "rerank"], default="embedding", help="what to train (default: embedding)"
    )


def run(args: argparse.Namespace) -> int:
    import json

    from pyqemb.data.files import atomic_file
    from pyqemb.errors import ConfigError

    path = args.folder / "run.toml"
    if path.exists():
        raise ConfigError(f"{path}: exists already; remove it, or give another folder: pyqemb init FOLDER")
    text = _TEMPLATE.read_text(encoding="utf-8")
    text = text.replace('"@MODEL@"', json.dumps(args.model)).replace("@TASK@", args.task)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"written to {path}; next: pyqemb train {path} --dry-run")
    return 0
