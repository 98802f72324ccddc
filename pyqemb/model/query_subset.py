"""Query subset: if only some output tokens of a layer are needed, only these are queries of its attention.

Legend: T tokens, S queries, F features in, G features out.
"""

from typing import Literal

import torch
from torch.nn import functional as F

from pyqemb import ops
from pyqemb.data.batch import PackedBatch
from pyqemb.model.packed_tokens import PackedTokens, Projection
from pyqemb.model.rope import Rope, Rotary


class QuerySubset(PackedTokens):
    """A layer whose queries are the first or last tokens of the non-empty sequences, and whose keys are all tokens.

    Attention masks are aligned to the bottom right, so a single query sees every key with either mask. For the first
    token that is right only with bidirectional attention.
    """

    def __init__(self, all_tokens: PackedTokens, batch: PackedBatch, only: Literal["first", "last"]):
        tokens_S, _ = batch.first_tokens() if only == "first" else batch.last_tokens()
        cu_queries = F.pad((batch.cu_seqlens_cpu.diff() > 0).cumsum(0), (1, 0)).int()
        counts = dict(tokens=len(tokens_S), tokens_k=batch.num_tokens)
        plan = ops.attention_plan(cu_queries, batch.cu_seqlens_cpu, **counts, device=tokens_S.device)
        super().__init__(plan, all_tokens.tables)
        self.all_tokens, self.tokens_S = all_tokens, tokens_S

    def project(self, projection: Projection, x_TF: torch.Tensor) -> torch.Tensor:
        """The projection of every token, [T, G]."""
        return self.all_tokens.project(projection, x_TF)

    def project_queries(self, projection: Projection, x_TF: torch.Tensor) -> torch.Tensor:
        """The projection of the query tokens, [S, G]."""
        return projection(self.queries(x_TF))

    def queries(self, x_TF: torch.Tensor) -> torch.Tensor:
        """The rows of the query tokens, [S, F]."""
        return self.all_tokens.queries(x_TF).index_select(0, self.tokens_S)

    def query_rotary(self, rope: Rope, head_dim: int) -> Rotary:
        """Angles of the query tokens."""
        return self.rotary(rope, head_dim).at(self.tokens_S)
