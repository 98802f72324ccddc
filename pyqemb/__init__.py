"""pyqemb: the training system behind Qwen3 Embedding, as a library.

Names are imported on first use, so that `pyqemb --help` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOME = {
    "Embedder": "pyqemb.model.embedder",
    "Reranker": "pyqemb.model.reranker",
    "PackedBatch": "pyqemb.data.batch",
    "read_examples": "pyqemb.data.example",
    "write_examples": "pyqemb.data.example",
    "GradCache": "pyqemb.training.grad_cache",
    "train": "pyqemb.api",
    "sweep": "pyqemb.api",
    "finish": "pyqemb.api",
    "TrainConfig": "pyqemb.training",
    "stage1": "pyqemb.training",
    "stage2": "pyqemb.training",
    "consolidate": "pyqemb.training",
    "merge": "pyqemb.merging",
    "evaluate": "pyqemb.evaluation",
    "curate": "pyqemb.curation",
    "mine": "pyqemb.curation",
    "synthesize": "pyqemb.synthesis",
    "register_transformers": "pyqemb.interop.attention",
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from pyqemb.api import finish as finish
    from pyqemb.api import sweep as sweep
    from pyqemb.api import train as train
    from pyqemb.curation import curate as curate
    from pyqemb.curation import mine as mine
    from pyqemb.data.batch import PackedBatch as PackedBatch
    from pyqemb.data.example import read_examples as read_examples
    from pyqemb.data.example import write_examples as write_examples
    from pyqemb.evaluation import evaluate as evaluate
    from pyqemb.interop.attention import register_transformers as register_transformers
    from pyqemb.merging import merge as merge
    from pyqemb.model.embedder import Embedder as Embedder
    from pyqemb.model.reranker import Reranker as Reranker
    from pyqemb.synthesis import synthesize as synthesize
    from pyqemb.training import TrainConfig as TrainConfig
    from pyqemb.training import consolidate as consolidate
    from pyqemb.training import stage1 as stage1
    from pyqemb.training import stage2 as stage2
    from pyqemb.training.grad_cache import GradCache as GradCache


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'pyqemb' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
