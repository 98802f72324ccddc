"""`pyqemb train run.toml`: check the configuration, show the plan, train, evaluate, save."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pyqemb.cli.logs import add_quiet, only_warnings

if TYPE_CHECKING:
    from pyqemb.training import TrainConfig
    from pyqemb.training.rank_plan import Ranks

_MOST_RANKS = 1_000_000  # of --world; the texts of each are listed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a .toml, .yaml or .json file")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="override one key, e.g. train.learning_rate=1e-4; may be repeated",
    )  # fmt: skip
    parser.add_argument("--resume", metavar="auto|PATH", help="continue the run in save.dir, or from a checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="print the settings of the run and the plan, then stop")
    shown = parser.add_mutually_exclusive_group()
    add_quiet(shown)
    shown.add_argument(
        "--json", action="store_true",
        help="print the rows of metrics.jsonl instead of progress; with --dry-run, one JSON object",
    )  # fmt: skip
    parser.add_argument(
        "--world", type=int, metavar="N",
        help="with --dry-run: plan the run for N ranks, which need not exist; no weights are read",
    )  # fmt: skip
    parser.add_argument(
        "--gpu-memory", metavar="SIZE", help="with --world: the memory of each rank's GPU, e.g. 80GB",
    )  # fmt: skip
    parser.add_argument(
        "--help-config", action=_HelpConfig, nargs="?", metavar="KEY",
        help="list the keys of the file, or explain one, e.g. train.warmup; then stop",
    )  # fmt: skip


class _HelpConfig(argparse.Action):
    """Prints and exits, as --help does."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        from pyqemb.cli.reference import explain_keys
        from pyqemb.data.settings_keys import tables
        from pyqemb.errors import ConfigError, did_you_mean
        from pyqemb.training.config import TrainConfig

        found = tables(TrainConfig)
        text = explain_keys(found, values)
        if text is None:
            names = [name for table in found for key in table.keys for name in (key.name, key.last)]
            raise ConfigError(f"--help-config: unknown key {values!r}{did_you_mean(values, names)}")
        print(text)
        parser.exit()


def run(args: argparse.Namespace) -> int:
    from pyqemb.data.rank_logs import rank_logs
    from pyqemb.training.parallel.world import rank_and_size

    rank, size = rank_and_size()
    with rank_logs(rank, size):
        return _run(args, rank)


def _run(args: argparse.Namespace, rank: int) -> int:
    from pyqemb.errors import ConfigError
    from pyqemb.evaluation import DevSets
    from pyqemb.training import load_config, train
    from pyqemb.training.preflight import unused_evaluation

    ranks = _ranks(args)
    config = load_config(args.config, args.overrides)
    evaluate = DevSets(config.eval, config.task) if config.eval.has_data else None
    if evaluate is None and (asked := unused_evaluation(config)):
        raise ConfigError(f"eval.{asked}: nothing is evaluated: eval.data or [[eval.datasets]] is missing")
    if args.dry_run:
        _print_plan(config, evaluate, args, ranks)
        return 0
    if args.quiet:
        only_warnings()
    progress: Literal["auto", "json", "off"] = "off" if args.quiet else "json" if args.json else "auto"
    result = train(config, evaluate=evaluate, resume=args.resume, progress=progress)
    if rank:
        return 0
    if args.json:
        best = None if result.best is None else str(result.best)
        print(json.dumps({"steps": result.steps, "folder": str(result.folder), "best": best}))
        return 0
    print(f"trained {result.steps} step{'s' * (result.steps != 1)}; the model is in {result.folder}")
    if result.best is not None:
        print(f"the best by evaluation is in {result.best}")
    return 0


def _ranks(args: argparse.Namespace) -> "Ranks | None":
    """The ranks of --world and --gpu-memory; None without them."""
    from pyqemb.errors import ConfigError
    from pyqemb.training.rank_plan import Ranks
    from pyqemb.training.section import size_in_bytes

    if args.world is None and args.gpu_memory is None:
        return None
    if not args.dry_run:
        raise ConfigError(
            "--world and --gpu-memory plan a run: they need --dry-run; torchrun starts the ranks of a run"
        )
    if args.world is None or args.gpu_memory is None:
        raise ConfigError("--world and --gpu-memory belong together: give both")
    if not 1 <= args.world <= _MOST_RANKS:
        raise ConfigError(f"--world: expected 1 to {_MOST_RANKS} ranks, got {args.world}")
    try:
        memory = size_in_bytes(args.gpu_memory)
    except ValueError as error:
        raise ConfigError(f"--gpu-memory: {error}, got {args.gpu_memory!r}") from error
    if memory is None:
        raise ConfigError(f"--gpu-memory: expected a size like '80GB', got {args.gpu_memory!r}")
    return Ranks(args.world, memory)


def _print_plan(config: "TrainConfig", evaluate: Any, args: argparse.Namespace, ranks: "Ranks | None") -> None:
    from pyqemb.training.dry_run import plan, settings_lines

    lines = list(plan(config, evaluate, args.resume, ranks))  # errors are raised before the configuration is printed
    if args.json:
        print(json.dumps({"config": config.model_dump(mode="json"), "plan": lines}))
    else:
        print("\n".join([*settings_lines(config), *lines]))


def kept(args: argparse.Namespace) -> str:
    return "nothing is lost; --resume auto continues from the newest checkpoint, or starts the run"
