"""Selection of training data: filters that count and explain dropped examples, and hard-negative mining."""

from pyqemb.curation.config import CurateConfig as CurateConfig
from pyqemb.curation.filters import Filtered as Filtered
from pyqemb.curation.filters import consistency as consistency
from pyqemb.curation.filters import distinct as distinct
from pyqemb.curation.filters import similarity as similarity
from pyqemb.curation.mining import Mined as Mined
from pyqemb.curation.mining import mine as mine
from pyqemb.curation.mining_plan import plan_mine as plan_mine
from pyqemb.curation.mining_tasks import mine_task as mine_task
from pyqemb.curation.pipeline import Curated as Curated
from pyqemb.curation.pipeline import curate as curate
