"""Residual-stream reuse: a second pass over the same batch leaves out the products that end in the residual stream.

A first pass keeps the stream after each of them. A second pass that needs gradients takes the stream from there: the
value of x + W y is known, only its gradients are computed. Same bits, a third of the products less.
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
    """Where a layer adds the results of its products: x + W y.

    Args:
        known: sums of an earlier pass over the same batch, taken instead of computing them.
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
    """What a pass leaves for a second pass over the same batch: the residual stream after each product, by layer.

    Given empty, the pass fills it. Given filled, the pass uses it.
    """

    def __init__(self) -> None:
        self.layers: list[SavedStream] = []

    def streams(self, layers: int) -> list[ResidualStream]:
        """The residual stream of each layer of a pass."""
        if self.layers:
            return [ResidualStream(known=sums) for sums in self.layers]
        self.layers = [{} for _ in range(layers)]
        return [ResidualStream(kept=sums) for sums in self.layers]
