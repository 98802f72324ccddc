"""Distinct-token projection: the first layer projects each distinct id once.

Before the first attention a token is its id alone.

Legend: T tokens, U distinct ids, F features in, G features out.
"""

import torch

from pyqemb.model.packed_tokens import PackedTokens, Projection

_WORTH = 0.75  # distinct ids per token above which the gathering costs more than it spares


class DistinctTokens(PackedTokens):
    """A layer whose input has a row for each distinct id: token t is row inverse_T[t]."""

    def __init__(self, tokens: PackedTokens, inverse_T: torch.Tensor):
        super().__init__(tokens.plan, tokens.tables)
        self.inverse_T = inverse_T

    def project(self, projection: Projection, x_UF: torch.Tensor) -> torch.Tensor:
        """The projection of every token, [T, G]."""
        return self.queries(projection(x_UF))

    def project_queries(self, projection: Projection, x_UF: torch.Tensor) -> torch.Tensor:
        """The projection of every token, [T, G]."""
        return self.queries(projection(x_UF))

    def queries(self, x_UF: torch.Tensor) -> torch.Tensor:
        """The row of every token, [T, F]."""
        return x_UF.index_select(0, self.inverse_T)  # its gradient is added up in order, and fast


def distinct(input_ids_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Distinct ids [U] and where each token finds its own; all ids and None where that would save little.

    On a GPU counting them would make the host wait.
    """
    if input_ids_T.device.type == "cpu" and len(input_ids_T):
        ids_U, inverse_T = input_ids_T.unique(return_inverse=True)
        if len(ids_U) < _WORTH * len(input_ids_T):
            return ids_U, inverse_T
    return input_ids_T, None
