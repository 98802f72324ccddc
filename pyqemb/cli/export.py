"""`pyqemb export MODEL --out FOLDER`: write a folder for other tools, and check that they load it."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyqemb.model.embedder import Embedder
    from pyqemb.model.reranker import Reranker


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder, or the name of a model on the hub")
    parser.add_argument("--out", "-o", type=Path, required=True, help="the folder to write")
    parser.add_argument("--adapter", type=Path, help="a LoRA adapter in peft's format to merge into the weights")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float16", "float32"],
        help="dtype of the weights (default: bfloat16)",
    )
    parser.add_argument("--format", choices=["causal-lm", "seq-cls"], help="form of a reranker (default: causal-lm)")
    parser.add_argument(
        "--reranker", action="store_true", help="treat a causal language model that pyqemb did not write as a reranker"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="load the folder in other libraries, compare the results, and check the files that servers read",
    )

    parser.add_argument("--push", metavar="ORG/NAME", help="upload the folder to the Hugging Face Hub, after --verify")
    parser.add_argument("--private", action="store_true", help="with --push: a new repository is private")


def run(args: argparse.Namespace) -> int:
    from pyqemb.data.files import check_writable
    from pyqemb.errors import ConfigError
    from pyqemb.model.encoder import open_model
    from pyqemb.model.hub import check_push, push_folder
    from pyqemb.model.lora import load_adapter
    from pyqemb.model.reranker import Reranker
    from pyqemb.model.source import local_folder

    if args.out.exists() and Path(args.model).exists() and args.out.resolve() == Path(args.model).resolve():
        raise ConfigError(f"--out: {args.out} is the model itself")
    check_writable(args.out, folder=True)
    if args.push is not None:
        check_push(args.push)
    elif args.private:
        raise ConfigError("--private needs --push")
    reranks = args.reranker or args.format is not None
    source = local_folder(args.model)
    # On the CPU the weights keep their stored dtype.
    model = Reranker.from_pretrained(source, device="cpu") if reranks else open_model(source, device="cpu")
    if args.adapter is not None:
        load_adapter(model.model, args.adapter)
    provenance = {"exported_from": str(args.model), "adapter": args.adapter and str(args.adapter)}
    if isinstance(model, Reranker):
        model.save_pretrained(args.out, args.dtype, provenance, args.format or "causal-lm")
    else:
        model.save_pretrained(args.out, args.dtype, provenance)
    print(f"written to {args.out}")
    code = _verified(args.out, source, model) if args.verify else 0
    if args.push is not None and code == 0:
        print(f"pushed to {push_folder(args.out, args.push, private=args.private or None)}")
    return code


def _verified(folder: Path, source: Path, model: "Embedder | Reranker") -> int:
    from rich.console import Console
    from rich.table import Table

    from pyqemb.interop.verify import verify
    from pyqemb.interop.verify_reranker import verify_reranker
    from pyqemb.interop.verify_source import verify_source
    from pyqemb.model.reranker import Reranker

    with contextlib.suppress(ModuleNotFoundError):  # then its checks are skipped
        from transformers.utils import logging

        logging.disable_progress_bar()
    checks = verify_reranker(folder) if isinstance(model, Reranker) else verify(folder)
    checks.append(verify_source(folder, source, model))
    table = Table("check", "outcome", "detail")
    for check in checks:
        table.add_row(check.name, check.outcome, check.detail)
    Console().print(table)
    return 3 if any(check.outcome == "failed" for check in checks) else 0
