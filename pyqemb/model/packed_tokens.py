"""The tokens of a packed batch as the input of a layer. Legend: T tokens, S queries, F features in, G features out."""

from collections.abc import Callable

import torch

from pyqemb import ops
from pyqemb.data.batch import PackedBatch
from pyqemb.model.rope import Rope, Rotary, RotaryTables

Projection = Callable[[torch.Tensor], torch.Tensor]


class PackedTokens:
    """Row t of a layer's input is token t, and every token is a query.

    `DistinctTokens` and `QuerySubset` replace it in layers that can skip a part of the computation.
    """

    def __init__(self, plan: ops.AttentionPlan, tables: RotaryTables):
        self.plan, self.tables = plan, tables

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device, dtype: torch.dtype) -> "PackedTokens":
        """All tokens of a batch, for layers that compute in `dtype`."""
        plan = ops.attention_plan(batch.cu_seqlens_cpu, tokens=batch.num_tokens, device=device)
        return cls(plan, RotaryTables(batch.positions_T, dtype))

    def project(self, projection: Projection, x_TF: torch.Tensor) -> torch.Tensor:
        """The projection of every token, [T, G]: keys and values."""
        return projection(x_TF)

    def project_queries(self, projection: Projection, x_TF: torch.Tensor) -> torch.Tensor:
        """The projection of the queries, [S, G]."""
        return projection(x_TF)

    def queries(self, x_TF: torch.Tensor) -> torch.Tensor:
        """The rows of the queries, [S, F], which the layer returns."""
        return x_TF

    def rotary(self, rope: Rope, head_dim: int) -> Rotary:
        """Angles of every token."""
        return self.tables(rope, head_dim)

    def query_rotary(self, rope: Rope, head_dim: int) -> Rotary:
        """Angles of the queries."""
        return self.tables(rope, head_dim)
