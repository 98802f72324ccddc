"""Both training stages: configuration, trainer, gradient cache, losses; checkpoints that resume bit for bit."""

from pyqemb.training.callbacks import Callback as Callback
from pyqemb.training.callbacks import TrainInfo as TrainInfo
from pyqemb.training.config import TrainConfig as TrainConfig
from pyqemb.training.config import load_config as load_config
from pyqemb.training.config import stage1 as stage1
from pyqemb.training.config import stage2 as stage2
from pyqemb.training.consolidation import consolidate as consolidate
from pyqemb.training.objectives import LossPart as LossPart
from pyqemb.training.objectives import Objective as Objective
from pyqemb.training.objectives import register_objective as register_objective
from pyqemb.training.section import Section as Section
from pyqemb.training.trainer import TrainResult as TrainResult
from pyqemb.training.trainer import train as train
