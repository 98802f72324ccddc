"""Gradient caching: the gradients of one big batch in the memory of one chunk.

Three functions: embed every chunk without a graph; take the loss and its gradient at the vectors; embed the chunks again
with a graph and hand each its part of that gradient. Source: Gao et al., arXiv 2101.06983.
Legend: B queries, M documents, S = B + M sequences, T tokens, E dimension.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from pyqemb.data.batch import PackedBatch, to_device

Model = Callable[[PackedBatch], torch.Tensor]
LossFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class RngState(NamedTuple):
    """What a dropout mask depends on: the generators of the CPU and of the device."""

    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RngState":
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


class GradCache:
    """One training step of any batch size.

    Args:
        model: PackedBatch [S sequences] -> vectors [S, E].
        loss_fn: (queries_BE, documents_ME) -> scalar, differentiable.
        tokens_per_chunk: tokens of one forward pass; a longer sequence gets a pass of its own.
    """

    def __init__(self, model: Model, loss_fn: LossFn, tokens_per_chunk: int = 8192):
        if tokens_per_chunk < 1:
            raise ValueError(f"tokens_per_chunk must be at least 1, got {tokens_per_chunk}")
        self.model, self.loss_fn, self.tokens_per_chunk = model, loss_fn, tokens_per_chunk

    def step(self, queries: PackedBatch, documents: PackedBatch) -> torch.Tensor:
        """Add the gradients of the loss over the whole batch to the parameters' .grad; returns the loss, detached.

        Queries and documents share one stream, cut where the token budget says after sorting by length. Equal to the
        same loss without caching up to rounding, for any budget. A loss that is not finite adds no gradient.
        The batches may stay on the CPU: the model fetches its chunks.
        """
        if not queries.num_sequences or not documents.num_sequences:
            raise ValueError(
                f"[GradCache] expected queries and documents, got {queries.num_sequences} and {documents.num_sequences}"
            )
        chunks, order = _chunks(queries, documents, self.tokens_per_chunk)
        if len(chunks) == 1:
            loss = self._loss(self.model(chunks[0]), order, queries.num_sequences)
            if torch.isfinite(loss):
                loss.backward()
            return loss.detach()
        vectors_SE, states = embed_without_graph(self.model, chunks)
        loss, cache_SE = loss_and_cache(lambda v: self._loss(v, order, queries.num_sequences), vectors_SE)
        if torch.isfinite(loss):
            embed_with_cache(self.model, chunks, cache_SE, states)
        return loss

    def _loss(self, sorted_SE: torch.Tensor, order: np.ndarray, num_queries: int) -> torch.Tensor:
        place = to_device(torch.from_numpy(np.argsort(order)), sorted_SE.device)
        vectors_SE = sorted_SE.index_select(0, place)
        return self.loss_fn(vectors_SE[:num_queries], vectors_SE[num_queries:])


def embed_without_graph(model: Model, chunks: Sequence[PackedBatch]) -> tuple[torch.Tensor, list[RngState] | None]:
    """Vectors [S, E] of all chunks, and the random state before each of them where the model draws numbers."""
    states: list[RngState] | None = [] if _draws(model) else None
    device = _device(model, chunks)
    vectors = []
    with torch.no_grad():
        for chunk in chunks:
            if states is not None:
                states.append(RngState.now(device))
            vectors.append(model(chunk))
    return torch.cat(vectors), states


def loss_and_cache(
    loss_fn: Callable[[torch.Tensor], torch.Tensor], vectors_SE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, detached, and its gradient at the vectors [S, E]."""
    leaves_SE = vectors_SE.detach().requires_grad_()
    loss = loss_fn(leaves_SE)
    (cache_SE,) = torch.autograd.grad(loss, leaves_SE)
    return loss.detach(), cache_SE


def embed_with_cache(
    model: Model, chunks: Sequence[PackedBatch], cache_SE: torch.Tensor, states: Sequence[RngState] | None = None
) -> None:
    """Embed again, with a graph, and let each chunk's part of the cached gradient flow back to the parameters."""
    device = cache_SE.device
    after = RngState.now(device) if states is not None else None
    first = 0
    for number, chunk in enumerate(chunks):
        if states is not None:
            states[number].restore(device)  # the same dropout masks as in the first pass, else the gradient is wrong
        last = first + chunk.num_sequences
        torch.autograd.backward(model(chunk), cache_SE[first:last])
        first = last
    if after is not None:
        after.restore(device)


def _chunks(queries: PackedBatch, documents: PackedBatch, budget: int) -> tuple[list[PackedBatch], np.ndarray]:
    """Chunks of both, longest sequences first, and which sequence stands at each place."""
    stream = PackedBatch.concat((queries, documents))
    if stream.num_tokens <= budget:
        return [stream], np.arange(stream.num_sequences)
    order = np.argsort(-stream.lengths, kind="stable")
    return stream.select(torch.from_numpy(order)).split(budget), order


def _device(model: Any, chunks: Sequence[PackedBatch]) -> torch.device:
    """Where the model draws its random numbers."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return chunks[0].device if parameter is None else parameter.device


def _draws(model: Any) -> bool:
    if not isinstance(model, nn.Module):
        return False
    return any(m.training and m.p > 0 for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
