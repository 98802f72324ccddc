"""Hooks of a training run: the base class, and the built-in callbacks."""

from pyqemb.training.callbacks.base import Callback as Callback
from pyqemb.training.callbacks.base import StepFunction as StepFunction
from pyqemb.training.callbacks.base import TrainInfo as TrainInfo
from pyqemb.training.callbacks.loggers import make_loggers as make_loggers
from pyqemb.training.callbacks.metrics import MetricsFile as MetricsFile
from pyqemb.training.callbacks.progress import ProgressDisplay as ProgressDisplay
from pyqemb.training.callbacks.progress import Throughput as Throughput
from pyqemb.training.callbacks.progress import progress_callbacks as progress_callbacks
