"""Residual-stream reuse: a second pass over a batch skips the products that are added to the residual stream.

The first pass stores the residual stream after each of these products. The second pass, which needs gradients, reads
the value of x + W y from there and computes only its gradients. The results have the same bits, with a third of the
products less.
"""

from typing import Protocol

import torch

from pyqemb.model.linear import Linear

SavedStream = dict[Linear, torch.Tensor]  # x + W y by its projection W


class AddingNorm(Protocol):
    """A norm that can take the sum of two tensors in the same pass over memory."""

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """The norm of x."""
        ...

    def add_and_norm(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of the sum, and the sum."""
        ...


class ResidualStream:
    """Adds the products of a layer to its input: x + W y.

    Args:
        known: sums of an earlier pass over the same batch, used instead of computing them.
        kept: filled with the sums of this pass.
    """

    def __init__(self, known: SavedStream | None = None, kept: SavedStream | None = None):
        self._known, self._kept = known or {}, kept

    def add(self, x: torch.Tensor, projection: Linear, y: torch.Tensor) -> torch.Tensor:
        """Return the sum of x and projection(y)."""
        known = self._known.get(projection)
        if known is not None:
            return projection.add_known_output(y, x, known)
        return self._keep(projection, x + projection(y))

    def add_and_norm(
        self, x: torch.Tensor, projection: Linear, y: torch.Tensor, norm: AddingNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """norm(x + projection(y)), and the sum."""
        if projection in self._known:
            total = self.add(x, projection, y)
            return norm(total), total
        normed, total = norm.add_and_norm(projection(y), x)
        return normed, self._keep(projection, total)

    def _keep(self, projection: Linear, total: torch.Tensor) -> torch.Tensor:
        if self._kept is not None:
            self._kept[projection] = total.detach()
        return total


class Boundaries:
    """The residual stream after each product, by layer, stored by one pass for a second pass over the same batch.

    A pass fills an empty object, and reads a filled one.
    """

    def __init__(self) -> None:
        self.layers: list[SavedStream] = []

    def streams(self, layers: int) -> list[ResidualStream]:
        """The residual stream of each layer of a pass."""
        if self.layers:
            return [ResidualStream(known=sums) for sums in self.layers]
        self.layers = [{} for _ in range(layers)]
        return [ResidualStream(kept=sums) for sums in self.layers]
