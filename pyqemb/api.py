"""`pyqemb.train`: training, and what the package evaluation measures while it goes on."""

from functools import wraps
from typing import Any

from pyqemb import training
from pyqemb.training import TrainConfig, TrainResult, load_config


@wraps(training.train)
def train(config: Any, *, evaluate: Any = None, **options: Any) -> TrainResult:
    """`training.train`, which measures the datasets of the `eval` section, or those of `evaluate`."""
    config = config if isinstance(config, TrainConfig) else load_config(config)
    if config.eval.has_data if evaluate is None else not callable(evaluate):
        from pyqemb.evaluation import DevSets  # a run without evaluation does not need it

        evaluate = DevSets(config.eval, config.task, evaluate)
    return training.train(config, evaluate=evaluate, **options)
