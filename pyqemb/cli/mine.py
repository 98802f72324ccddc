"""`pyqemb mine MODEL FILE --out FILE`: the same pairs with hard negatives."""

import argparse
from pathlib import Path

from pyqemb.cli.columns import add_columns
from pyqemb.cli.logs import add_quiet, progress_shown


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
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
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
    report = mined.report
    print(f"{report.rows} rows, {report.documents} documents, {report.short} rows with fewer than {args.k} negatives")
    print(report.scores)
    print(f"written to {args.out}")
    return 0


def kept(args: argparse.Namespace) -> str:
    return (
        f"the vectors so far are in {args.cache}; the same command continues from there"
        if args.cache
        else "nothing is kept; --cache keeps the vectors"
    )
