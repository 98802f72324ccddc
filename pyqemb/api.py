"""`pyqemb.train`: training together with evaluation."""

from functools import wraps
from typing import Any

from pyqemb import training
from pyqemb.training import TrainConfig, TrainResult, load_config


@wraps(training.train)
def train(config: Any, *, evaluate: Any = None, **options: Any) -> TrainResult:
    """`training.train` with evaluation on the datasets of the `eval` section, or on those of `evaluate`."""
    config = config if isinstance(config, TrainConfig) else load_config(config)
    if config.eval.has_data if evaluate is None else not callable(evaluate):
        from pyqemb.evaluation import DevSets  # not needed without evaluation

        evaluate = DevSets(config.eval, config.task, evaluate)
    return training.train(config, evaluate=evaluate, **options)
