"""Evaluation on retrieval, STS and bitext data, from folders or examples, with bootstrap intervals."""

from pyqemb.evaluation.dev import DevSets as DevSets
from pyqemb.evaluation.run import compare_storage as compare_storage
from pyqemb.evaluation.run import evaluate as evaluate
from pyqemb.evaluation.run import retrieve as retrieve
from pyqemb.evaluation.run import score_rankings as score_rankings
from pyqemb.evaluation.storage import rank as rank
from pyqemb.evaluation.tasks import Bitext as Bitext
from pyqemb.evaluation.tasks import Retrieval as Retrieval
from pyqemb.evaluation.tasks import Sts as Sts
