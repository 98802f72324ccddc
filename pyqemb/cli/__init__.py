"""The command line: `pyqemb VERB`. One module per verb, imported only when it is called, so that --help is fast."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

from pyqemb import __version__
from pyqemb.cli.exits import EXIT_CODES, guarded
from pyqemb.cli.logs import log_to_stderr

VERBS = {
    "init": "write a commented run.toml to start from",
    "doctor": "show what is installed and test its kernels",
    "demo": "run the whole recipe on the data that ship with pyqemb: a model, a table and a report",
    "synthesize": "write training pairs for passages with a language model",
    "curate": "filter, de-duplicate and decontaminate training pairs, with a report",
    "mine": "add hard negatives to training pairs",
    "train": "train an embedding model or a reranker from a configuration file",
    "sweep": "train every combination of some settings, and compare the runs",
    "consolidate": "write the model of a run's newest checkpoint, sharded or not, as a portable folder",
    "merge": "merge checkpoints into one model (slerp, linear, karcher)",
    "evaluate": "evaluate a model on retrieval, STS or bitext data, or a reranker on examples with negatives",
    "encode": "encode a file of texts and write the vectors",
    "status": "show how far a job of encode, or of tasks that mine, is",
    "finish": "join the parts that the tasks of a job have made",
    "export": "write a model folder for other tools, and check that they load it",
    "rerank": "score query-document pairs with a reranker",
    "schema": "print the JSON Schema of a configuration file, for editors",
    "completion": "print the completion script of a shell",
}


KEPT = "outputs are written in full or not at all"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns one of EXIT_CODES."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    namespace = argparse.Namespace(verb=chosen if chosen in VERBS else None)

    def verb() -> Any:
        return import_module(f"pyqemb.cli.{namespace.verb}")

    def work() -> int:
        parser = whole_parser([chosen])
        _, unknown = parser.parse_known_args(arguments, namespace)
        if unknown:  # parse_args would show the usage of pyqemb instead of that of the verb
            namespace.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        return verb().run(namespace)

    def kept() -> str:
        parsed = hasattr(namespace, "debug")
        return verb().kept(namespace) if parsed and hasattr(verb(), "kept") else KEPT

    name = "pyqemb" if namespace.verb is None else f"pyqemb {namespace.verb}"
    with log_to_stderr():
        return guarded(work, name, "--debug" in arguments, kept, 75 if namespace.verb in ("train", "sweep") else None)


def whole_parser(of: Iterable[str | None] = tuple(VERBS)) -> argparse.ArgumentParser:
    """The parser, with the options of the verbs `of`, whose modules it imports."""
    codes = "exit codes:\n" + "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())
    parser = argparse.ArgumentParser(
        prog="pyqemb", description="Train, merge and measure text embedding models.", epilog=codes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"pyqemb {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, help_line in VERBS.items():
        child = verbs.add_parser(verb, help=help_line, description=help_line)
        child.set_defaults(parser=child)
        child.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        if verb in of:
            import_module(f"pyqemb.cli.{verb}").add_arguments(child)
    return parser
