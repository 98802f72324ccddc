"""The objectives that datasets are trained with: one class each, found by its name."""

from pyqemb.training.objectives.base import LossParameters as LossParameters
from pyqemb.training.objectives.base import LossPart as LossPart
from pyqemb.training.objectives.base import Objective as Objective
from pyqemb.training.objectives.cosent import CoSENT
from pyqemb.training.objectives.distillation import Distillation
from pyqemb.training.objectives.info_nce import Classification, InfoNCE
from pyqemb.training.objectives.registry import objective_class as objective_class
from pyqemb.training.objectives.registry import objective_of as objective_of
from pyqemb.training.objectives.registry import register_objective as register_objective
from pyqemb.training.objectives.registry import with_in_batch_negatives as with_in_batch_negatives
from pyqemb.training.objectives.yes_no import YesNo

for _objective in (InfoNCE, Classification, CoSENT, Distillation, YesNo):
    register_objective(_objective)
