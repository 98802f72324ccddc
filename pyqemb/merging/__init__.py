"""Merging checkpoints: slerp, linear and Karcher blends, streamed."""

from pyqemb.merging.run import MergeReport as MergeReport
from pyqemb.merging.run import merge as merge
