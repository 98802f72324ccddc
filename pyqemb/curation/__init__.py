"""Choosing training data: filters that count what they drop, hard negatives."""

from pyqemb.curation.filters import Filtered as Filtered
from pyqemb.curation.filters import consistency as consistency
from pyqemb.curation.filters import distinct as distinct
from pyqemb.curation.filters import similarity as similarity
from pyqemb.curation.mining import Mined as Mined
from pyqemb.curation.mining import mine as mine
