"""The native ops, differentiable: attention over packed sequences, last-token pooling, InfoNCE, exact search.

The only importer of `pyqemb._C`. Legend: T query tokens, S key tokens, N query heads, K key heads, D head dim, E hidden
size, B sequences or queries, M documents.
"""

import torch  # noqa: F401  torch first: the native code uses the OpenMP runtime that torch loads

try:
    from pyqemb import _C
except ImportError as error:
    raise ImportError(
        "pyqemb's native library is missing or was built for another Python. "
        "Build it with `pip install .` (or `make build`) in the source folder; it needs a C++20 compiler."
    ) from error

from pyqemb.ops import kernel_sets  # noqa: F401  before the first call
from pyqemb.ops.attention import AttentionPlan, attention_plan, varlen_attention
from pyqemb.ops.groups import Group
from pyqemb.ops.info_nce import info_nce
from pyqemb.ops.last_token_pool import last_token_pool
from pyqemb.ops.linear import linear
from pyqemb.ops.losses import cosent, distill_embeddings, distill_scores, yes_no
from pyqemb.ops.qk_norm_rope import qk_norm_rope, rope
from pyqemb.ops.rms_norm import rms_norm
from pyqemb.ops.shingles import min_hash, shingles
from pyqemb.ops.swiglu import swiglu
from pyqemb.ops.top_k import top_k


def cuda_is_built() -> bool:
    """Whether the native library has CUDA kernels.

    Returns:
        True if it was built with nvcc.

    Example:
        >>> pyqemb.ops.cuda_is_built() in (True, False)
        True
    """
    return _C.cuda_is_built()


__all__ = [
    "AttentionPlan", "Group", "attention_plan", "cosent", "cuda_is_built", "distill_embeddings", "distill_scores",
    "info_nce", "last_token_pool", "linear", "min_hash", "qk_norm_rope", "rms_norm",
    "rope", "shingles", "swiglu", "top_k", "varlen_attention", "yes_no",
]  # fmt: skip
