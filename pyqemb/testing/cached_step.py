"""A small contrastive step, and its gradients without caching: what cached ones are held to."""

from collections.abc import Callable

import torch
from torch import nn

from pyqemb import ops
from pyqemb.data.batch import PackedBatch
from pyqemb.testing.tiny import tiny_embedder

Gradients = dict[str, torch.Tensor]


def batches(queries: int = 7, documents: int = 12, seed: int = 0) -> tuple[PackedBatch, PackedBatch]:
    """Return a batch of queries and one of documents with random token ids, 1 to 29 tokens a text."""
    generator = torch.Generator().manual_seed(seed)

    def texts(count: int) -> PackedBatch:
        lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
        return PackedBatch.pack([torch.randint(0, 380, (n,), generator=generator).tolist() for n in lengths])

    return texts(queries), texts(documents)


def loss_fn(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """Return the InfoNCE loss of [B, E] queries and [M, E] documents; document i is the positive of query i."""
    return ops.info_nce(queries, documents, torch.arange(len(queries)), temperature=0.1)


def backward(loss: torch.Tensor) -> torch.Tensor:
    """Run the backward pass and return the detached loss."""
    loss.backward()
    return loss.detach()


def gradients(model: nn.Module, step: Callable[[], torch.Tensor]) -> tuple[float, Gradients]:
    """The loss of `step` and what it adds to every parameter that is not frozen."""
    model.zero_grad()
    loss = step()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert grads, "a vacuous comparison"
    assert all(g.abs().sum() > 0 for g in grads.values()), "a vacuous comparison"
    return float(loss), grads


def uncached(model: nn.Module, queries: PackedBatch, documents: PackedBatch) -> Callable[[], torch.Tensor]:
    """Return a step that embeds both batches at once and backpropagates through the model."""
    return lambda: backward(loss_fn(model(queries), model(documents)))


def assert_close(grads: Gradients, truth: Gradients, tolerance: float) -> None:
    """Fail if a gradient differs from the truth by `tolerance` or more, relative to the norm of the truth."""
    assert grads.keys() == truth.keys()
    for name, gradient in grads.items():
        assert float((gradient - truth[name]).norm() / truth[name].norm()) < tolerance, name


class Dropping(nn.Module):
    """Vectors with dropout; remembers what it gave."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embedder, self.dropout = tiny_embedder().to(dtype), nn.Dropout(0.3)
        self.seen: list[torch.Tensor] = []

    def forward(self, batch: PackedBatch, boundaries: object = None) -> torch.Tensor:
        """Return the embedder's vectors [B, E] after dropout."""
        vectors = self.dropout(self.embedder(batch, boundaries=boundaries))
        self.seen.append(vectors.detach().clone())
        return vectors
