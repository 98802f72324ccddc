"""`pyqemb mine MODEL FILE --out FILE`: the same pairs with hard negatives."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pyqemb.cli.columns import add_columns
from pyqemb.cli.logs import add_quiet, progress_shown
from pyqemb.cli.tasks import add_tasks, own_task

if TYPE_CHECKING:
    from pyqemb.curation import Mined
    from pyqemb.jobs.tasks import Task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a Qwen3 or sentence-transformers folder, or a Qwen3 model on the hub")
    parser.add_argument("examples", help="training pairs in any form that pyqemb reads, or hub://ORG/NAME")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    parser.add_argument(
        "--split", help="split of a folder or of a dataset on the hub (default: train, or the only one)"
    )
    add_columns(parser)
    parser.add_argument(
        "--corpus", type=Path, help="more candidate documents: a corpus (JSONL with `text`), its folder, or examples"
    )
    parser.add_argument("--k", type=int, default=7, help="negatives for each query (default: 7)")
    parser.add_argument(
        "--max-positive-ratio",
        type=float,
        default=0.95,
        help="highest score of a negative, as a share of the positive's score (default: 0.95)",
    )
    parser.add_argument("--margin", type=float, help="a negative scores at least this much less than the positive")
    parser.add_argument("--max-score", type=float, help="highest cosine similarity of a negative")
    parser.add_argument(
        "--mean-margin",
        type=float,
        help="a negative scores at most this much more than the mean of the query's positives",
    )
    parser.add_argument("--skip-top", type=int, default=0, help="skip so many of the best candidates (default: 0)")
    parser.add_argument("--depth", type=int, default=100, help="number of candidates for each query (default: 100)")
    parser.add_argument(
        "--sampling",
        choices=["top", "random", "softmax"],
        default="top",
        help="how negatives are chosen among the candidates (default: top)",
    )
    parser.add_argument(
        "--sampling-temperature", type=float, default=0.05, help="temperature of softmax sampling (default: 0.05)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sampling (default: 0)")
    parser.add_argument("--instruction", help="default instruction, used for queries without their own")
    parser.add_argument(
        "--by-language", action="store_true", help="take only negatives in the language of the positive"
    )
    parser.add_argument("--reranker", type=Path, help="a cross-encoder folder that rescores the candidates")
    parser.add_argument(
        "--approximate", metavar="INDEX", help="search with a faiss index, e.g. HNSW32, instead of exactly"
    )
    parser.add_argument("--cache", type=Path, help="a folder for the vectors; a killed job continues from it")
    after = ". Run all tasks twice: first they encode, then they search; pyqemb finish OUT then writes OUT"
    add_tasks(parser, after, "the job in tasks")
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    own = own_task(args)
    if args.dry_run:
        return _plan(args, 1 if own is None else own.tasks)
    return _run_alone(args) if own is None else _run_task(args, own)


def show(mined: "Mined", k: int | None, out: Path) -> None:
    """Print the statistics of mining. `k` is the number of negatives wanted, None if it is not known."""
    report = mined.report
    wanted = "k" if k is None else k
    print(f"{report.rows} rows, {report.documents} documents, {report.short} rows with fewer than {wanted} negatives")
    print(report.scores)
    print(f"written to {out}")


def _plan(args: argparse.Namespace, tasks: int) -> int:
    from pyqemb.curation import plan_mine
    from pyqemb.data.columns import parse_columns

    _check_options(args, "--dry-run")
    plan = plan_mine(
        args.model, args.examples, args.out, tasks=tasks, split=args.split, columns=parse_columns(args.column),
        corpus=args.corpus, skip_top=args.skip_top, depth=args.depth, instruction=args.instruction,
    )  # fmt: skip
    for line in plan.lines():
        print(line)
    return 0


def _check_options(args: argparse.Namespace, mode: str) -> None:
    from pyqemb.errors import ConfigError

    for option in ("reranker", "approximate", "cache", "by_language"):
        if getattr(args, option):
            raise ConfigError(f"--{option.replace('_', '-')} is not possible with {mode}")


def _run_task(args: argparse.Namespace, own: "Task") -> int:
    from pyqemb.curation import mine_task
    from pyqemb.data.columns import parse_columns

    _check_options(args, "--tasks")
    with progress_shown(args.quiet):
        done = mine_task(
            args.model, args.examples, args.out, tasks=own.tasks, task=own.number, split=args.split,
            columns=parse_columns(args.column), corpus=args.corpus, k=args.k,
            max_positive_ratio=args.max_positive_ratio, margin=args.margin, max_score=args.max_score,
            mean_margin=args.mean_margin, skip_top=args.skip_top, depth=args.depth, sampling=args.sampling,
            sampling_temperature=args.sampling_temperature, seed=args.seed, instruction=args.instruction,
        )  # fmt: skip
    if done.missing:
        print(
            f"{own}: encoded; vectors of other tasks are missing ({done.missing:,} parts); when all tasks have "
            "encoded, run them again to search"
        )
    else:
        print(f"{own}: searched; when all tasks have searched, run pyqemb finish {args.out}")
    return 0


def _run_alone(args: argparse.Namespace) -> int:
    from pyqemb.curation import mine
    from pyqemb.curation.corpus import read_corpus
    from pyqemb.curation.text import language_of
    from pyqemb.data.columns import parse_columns
    from pyqemb.data.example import check_output, read_examples, write_examples
    from pyqemb.data.files import check_writable
    from pyqemb.errors import ConfigError
    from pyqemb.model.encoder import open_encoder, open_reranker

    columns = parse_columns(args.column)
    if args.out.resolve() in {Path(path).resolve() for path in (args.examples, args.corpus) if path is not None}:
        raise ConfigError(f"--out: {args.out} is also an input")
    check_output(args.out)
    check_writable(args.out)
    examples = read_examples(args.examples, args.split, columns=columns)
    corpus = None if args.corpus is None else list(read_corpus(args.corpus))
    with progress_shown(args.quiet):
        mined = mine(
            open_encoder(args.model), examples, corpus=corpus, k=args.k, max_positive_ratio=args.max_positive_ratio,
            margin=args.margin, max_score=args.max_score, skip_top=args.skip_top, depth=args.depth,
            sampling=args.sampling, seed=args.seed, instruction=args.instruction, mean_margin=args.mean_margin,
            sampling_temperature=args.sampling_temperature, pool_of=language_of if args.by_language else None,
            approximate=args.approximate, cache=args.cache,
            reranker=None if args.reranker is None else open_reranker(args.reranker),
        )  # fmt: skip
    write_examples(args.out, mined.examples)
    show(mined, args.k, args.out)
    return 0


def kept(args: argparse.Namespace) -> str:
    if args.tasks is not None:
        return f"finished parts are in {args.out}.parts; the same command continues from there"
    return (
        f"the vectors so far are in {args.cache}; the same command continues from there"
        if args.cache
        else "nothing is kept; --cache keeps the vectors"
    )
