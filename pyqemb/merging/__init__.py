"""Merging of checkpoints, tensor by tensor: slerp, linear interpolation and the Karcher mean."""

from pyqemb.merging.run import MergeReport as MergeReport
from pyqemb.merging.run import merge as merge
