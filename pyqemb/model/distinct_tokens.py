"""Distinct-token projection: the first layer projects each distinct id once.

Before the first attention, the hidden state of a token depends only on its id.

Legend: T tokens, U distinct ids, F features in, G features out.
"""

import torch

from pyqemb.model.packed_tokens import PackedTokens, Projection

_WORTH = 0.75  # with more distinct ids per token, gathering costs more than it saves


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
        return x_UF.index_select(0, self.inverse_T)  # has a fast gradient that is summed in a fixed order


def distinct(input_ids_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The distinct ids [U] and the index of each token's id; all ids and None if deduplication would save little.

    On a GPU it always returns all ids, because counting distinct ids would make the host wait.
    """
    if input_ids_T.device.type == "cpu" and len(input_ids_T):
        ids_U, inverse_T = input_ids_T.unique(return_inverse=True)
        if len(ids_U) < _WORTH * len(input_ids_T):
            return ids_U, inverse_T
    return input_ids_T, None
