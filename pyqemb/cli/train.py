"""`pyqemb train run.toml`: check the configuration, show the plan, train, measure on the dev set, save."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyqemb.model.embedder import Embedder
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
    from pyqemb.training import load_config, train

    config = load_config(args.config, args.overrides)
    if args.dry_run:
        _print_plan(config)
        return 0
    result = train(config, evaluate=_dev_set(config), resume=args.resume)
    print(f"trained {result.steps} steps; the model is in {result.folder}")
    if result.best is not None:
        print(f"the best by evaluation is in {result.best}")
    return 0


def _dev_set(config: "TrainConfig") -> Any:
    """The evaluation of eval.data as a callback: training knows no metrics."""
    if config.eval.data is None:
        return None
    from pyqemb.evaluation import evaluate
    from pyqemb.evaluation.tasks import load_task

    folder, split = config.eval.data, "dev"
    if config.task == "rerank":
        return lambda model: _values(evaluate(model, folder, bootstrap=0))
    if not (Path(folder) / "qrels" / "dev.tsv").is_file():
        split = "test"
    load_task(folder, split)  # a folder that cannot be read stops the run before it starts

    def measure(embedder: "Embedder") -> dict[str, float]:
        return _values(evaluate(embedder, folder, split=split, bootstrap=0))

    return measure


def _values(report: dict[str, Any]) -> dict[str, float]:
    return {name: value["value"] for name, value in report["metrics"].items()}


def _print_plan(config: "TrainConfig") -> None:
    import json

    from pyqemb.training.plan import plan

    print(json.dumps(config.model_dump(mode="json"), indent=1))
    for line in plan(config):
        print(line)
