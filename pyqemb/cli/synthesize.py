"""`pyqemb synthesize FILE.toml`: generate training pairs for passages with a language model."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        type=Path,
        help="a .toml, .yaml or .json file with passages, out, [endpoint] and the values to draw for each example",
    )
    parser.add_argument(
        "--out", type=Path, help="output folder, instead of the one in the file; an unfinished job there continues"
    )
    parser.add_argument("--limit", type=int, help="use at most LIMIT passages")
    parser.add_argument(
        "--attempts", type=int, help="attempts for each answer; a higher number than before repeats the malformed ones"
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from pyqemb.synthesis.config import SynthesisConfig
    from pyqemb.synthesis.generate import Synthesis, synthesize

    given = {"out": args.out, "limit": args.limit, "attempts": args.attempts}
    config = SynthesisConfig.from_file(args.config, {key: value for key, value in given.items() if value is not None})
    total = None if config.limit is None else config.limit * config.per_passage
    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def show(so_far: Synthesis) -> None:
            done = so_far.examples + so_far.failed
            usage, rate = so_far.usage, done / max(so_far.seconds, 1e-9)
            status = (
                f"{rate:.1f}/s, {usage.prompt_tokens + usage.completion_tokens:,} tokens, cost "
                f"{usage.cost(config.endpoint):.4f}"
            )
            bar.update(task, completed=done, description=f"{status}, {so_far.malformed.total()} malformed")

        result = synthesize(config, on_progress=show)
    usage = result.usage
    print(f"{result.examples} examples, {result.failed} given up, in {result.seconds:.1f} s")
    print(f"{usage.asked} requests, {usage.stored} answers from the store, {usage.retries.total()} retries")
    print(f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, cost {usage.cost(config.endpoint):.4f}")
    for reason, count in result.malformed.most_common():
        print(f"  {count} malformed: {reason}{f', e.g. {result.refusal!r}' if reason == 'refused' else ''}")
    print(f"written to {result.folder}/examples.jsonl")
    return 0


def kept(args: argparse.Namespace) -> str:
    return "the answers so far are in answers.sqlite of the output folder; the same command continues from there"
