"""Gradient caching (Gao et al., arXiv 2101.06983): large batches with bounded memory. See docs/dev/grad_cache.md."""

from pyqemb.training.grad_cache.cache import ForwardRecord as ForwardRecord
from pyqemb.training.grad_cache.cache import GradCache as GradCache
from pyqemb.training.grad_cache.cache import StepReport as StepReport
from pyqemb.training.grad_cache.passes import embed_with_cache as embed_with_cache
from pyqemb.training.grad_cache.passes import embed_without_graph as embed_without_graph
from pyqemb.training.grad_cache.passes import loss_and_cache as loss_and_cache
from pyqemb.training.grad_cache.plan import Plan as Plan
