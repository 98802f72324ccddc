"""Measuring: retrieval, STS and bitext folders, with bootstrap intervals."""

from pyqemb.evaluation.dev import DevSets as DevSets
from pyqemb.evaluation.run import evaluate as evaluate
from pyqemb.evaluation.run import rank as rank
from pyqemb.evaluation.run import retrieve as retrieve
from pyqemb.evaluation.run import score_rankings as score_rankings
