"""`pyqemb train run.toml`: check the configuration, show the plan, train, measure on the dev set, save."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyqemb.training import TrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a .toml, .yaml or .json file")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="override one key, e.g. train.learning_rate=1e-4; may be repeated",
    )  # fmt: skip
    parser.add_argument("--resume", metavar="auto|PATH", help="continue the run in save.dir, or from a checkpoint")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and the plan, then stop"
    )


def run(args: argparse.Namespace) -> int:
    from pyqemb.errors import ConfigError
    from pyqemb.evaluation import DevSets
    from pyqemb.training import load_config, train
    from pyqemb.training.preflight import unused_evaluation

    config = load_config(args.config, args.overrides)
    measured = config.eval.data is not None or config.eval.datasets
    evaluate = DevSets(config.eval, config.task) if measured else None
    if not measured and (asked := unused_evaluation(config)):
        raise ConfigError(f"eval.{asked}: nothing is evaluated: eval.data or [[eval.datasets]] is missing")
    if args.dry_run:
        _print_plan(config, evaluate, args.resume)
        return 0
    result = train(config, evaluate=evaluate, resume=args.resume)
    print(f"trained {result.steps} steps; the model is in {result.folder}")
    if result.best is not None:
        print(f"the best by evaluation is in {result.best}")
    return 0


def _print_plan(config: "TrainConfig", evaluate: Any, resume: str | None) -> None:
    import json

    from pyqemb.training.dry_run import plan

    lines = list(plan(config, evaluate, resume))  # what is wrong shows before the configuration scrolls by
    print(json.dumps(config.model_dump(mode="json"), indent=1))
    print("\n".join(lines))


def kept(args: argparse.Namespace) -> str:
    return "nothing is lost; --resume auto goes on from the newest checkpoint, or starts the run"
