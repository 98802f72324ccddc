"""The matrix products of a decoder, each with an optional low-rank adapter.

Legend: R rank, I and O features in and out.
"""

import torch
from torch import nn

from pyqemb import ops
from pyqemb.ops.linear import add_known_output


class Lora(nn.Module):
    """The output of a low-rank adapter, which is added to a product: scale (x A^T) B^T."""

    def __init__(self, a_RI: torch.Tensor, b_OR: torch.Tensor, scale: float, dropout: float = 0.0):
        super().__init__()
        self.A, self.B, self.scale, self.dropout = nn.Parameter(a_RI), nn.Parameter(b_OR), scale, nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scale (x A^T) B^T: [..., I] -> [..., O]; in training mode, dropout is applied to x."""
        return ops.linear(ops.linear(self.dropout(x), self.A), self.B) * self.scale


class Linear(nn.Linear):
    """x W^T (+ b), computed by `ops.linear`, plus the output of the adapter if there is one."""

    lora: Lora | None

    def __init__(self, inputs: int, outputs: int, bias: bool):
        super().__init__(inputs, outputs, bias)
        self.lora = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T (+ b), plus the output of the adapter if there is one: [..., I] -> [..., O]."""
        product = ops.linear(x, self.weight)
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        return product if self.lora is None else product + self.lora(x)

    def add_known_output(self, x: torch.Tensor, residual: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Return residual + x W^T (+ b), whose value `total` is known.

        The forward pass skips the product; the backward pass computes its gradients.
        """
        if self.bias is not None:
            residual = residual + self.bias.to(residual.dtype)
        if self.lora is not None:
            residual = residual + self.lora(x)
        return add_known_output(x, self.weight.to(x.dtype), residual, total)  # they differ under autocast
