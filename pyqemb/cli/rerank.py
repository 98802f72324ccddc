"""`pyqemb rerank MODEL FILE --out FILE`: score query-document pairs with a reranker."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ROWS_AT_ONCE = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a reranker folder, or the name of one on the hub")
    parser.add_argument("pairs", type=Path, help="rows of `query` with `document`, or with a list `documents`")
    parser.add_argument(
        "--out", type=Path, required=True, help="JSONL file to write: the rows with `score` or `scores`"
    )
    parser.add_argument(
        "--instruction", help="default instruction, used for rows without their own (default: the model's own)"
    )
    parser.add_argument("--top-k", type=int, help="sort each row's documents, best first, and keep TOP_K of them")


def run(args: argparse.Namespace) -> int:
    from pyqemb.data.example import check_output, write_rows
    from pyqemb.data.files import check_writable
    from pyqemb.errors import ConfigError
    from pyqemb.model.reranker import Reranker

    if args.out.resolve() == args.pairs.resolve():
        raise ConfigError(f"--out: {args.out} is also the input")
    if args.top_k is not None and args.top_k < 1:
        raise ConfigError(f"--top-k must be at least 1, got {args.top_k}")
    check_output(args.out)
    check_writable(args.out)
    model, count = Reranker.from_pretrained(args.model), 0

    def scored() -> Iterator[dict[str, Any]]:
        nonlocal count
        for rows in _windows(args.pairs):
            pairs = [(row["query"], text) for row in rows for text in _documents(row)]
            instructions = [row.get("instruction") or args.instruction for row in rows for _ in _documents(row)]
            scores = iter(model.score(pairs, instruction=instructions).tolist())
            for row in rows:
                yield _scored(row, [next(scores) for _ in _documents(row)], args.top_k)
            count += len(pairs)

    write_rows(args.out, scored())
    print(f"{count} pairs scored, written to {args.out}")
    return 0


def _windows(path: Path) -> Iterator[list[dict[str, Any]]]:
    from pyqemb.data.rows import read_rows
    from pyqemb.errors import DataError

    rows: list[dict[str, Any]] = []
    for where, row in read_rows(path):
        documents = row.get("documents", [row.get("document")])
        good = isinstance(row.get("query"), str) and isinstance(documents, list)
        if not good or not all(isinstance(text, str) for text in documents):
            raise DataError(f"{where}: expected a query with a document or documents, the row has {sorted(row)}")
        rows.append(row)
        if len(rows) == _ROWS_AT_ONCE:
            yield rows
            rows = []
    if rows:
        yield rows


def _documents(row: dict[str, Any]) -> list[str]:
    return row["documents"] if "documents" in row else [row["document"]]


def _scored(row: dict[str, Any], scores: list[float], top_k: int | None) -> dict[str, Any]:
    if "documents" not in row:
        return {**row, "score": scores[0]}
    if top_k is None:
        return {**row, "scores": scores}
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
    return {**row, "documents": [row["documents"][i] for i in order], "scores": [scores[i] for i in order]}
