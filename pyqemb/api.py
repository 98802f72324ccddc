"""`pyqemb.train`: training, and what the package evaluation measures while it goes on."""

from collections.abc import Mapping
from functools import wraps
from typing import Any

from pyqemb import training
from pyqemb.training import TrainConfig, TrainResult, load_config


@wraps(training.train)
def train(config: Any, *, evaluate: Any = None, **options: Any) -> TrainResult:
    """`training.train`, whose `evaluate` may be datasets by name."""
    if isinstance(evaluate, Mapping):
        from pyqemb.evaluation import DevSets  # a run without evaluation does not need it

        config = config if isinstance(config, TrainConfig) else load_config(config)
        evaluate = DevSets(config.eval, config.task, evaluate)
    return training.train(config, evaluate=evaluate, **options)
