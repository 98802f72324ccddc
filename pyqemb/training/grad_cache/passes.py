"""The three functions of gradient caching, and the record that the first stores for the third.

embed_without_graph returns a PassRecord, loss_and_cache the gradient at the vectors, and embed_with_cache propagates it
through each chunk. Source: Gao et al., arXiv 2101.06983. Legend: U sequences of all chunks, E dimension.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from pyqemb.data.batch import PackedBatch, to_device
from pyqemb.model.residual_stream import Boundaries
from pyqemb.training.grad_cache.chunks import chunk as pack_into_chunks

Model = Callable[..., torch.Tensor]
OnePass = Callable[[bool], AbstractContextManager[None]]  # argument: whether the pass is the last one


class RngState(NamedTuple):
    """The states of the random generators of the CPU and of the device, which determine dropout masks."""

    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RngState":
        """Return the current state of the generators of the CPU and of `device`."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        """Restore this state of the generators of the CPU and of `device`."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


class Autocast(NamedTuple):
    """The autocast state of a device, to be entered again later."""

    device_type: str
    dtype: torch.dtype
    enabled: bool
    cache: bool

    @classmethod
    def now(cls, device: torch.device) -> "Autocast":
        """Return the autocast state of `device`."""
        kind = device.type
        return cls(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled()
        )

    def entered(self) -> torch.autocast:
        """Return a context in which autocast has this state."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=self.cache)


@dataclass
class PassRecord:
    """Results of the first pass for the second."""

    vectors_UE: torch.Tensor  # detached, in the order of the chunks
    chunks: list[PackedBatch]
    autocast: Autocast
    states: list[RngState] | None = None  # before each chunk, if the model uses random numbers
    graphs: dict[int, torch.Tensor] = field(default_factory=dict)  # vectors of the chunks that kept their graph
    boundaries: dict[int, Boundaries] = field(default_factory=dict)  # of chunks that did not

    def rows(self, number: int) -> np.ndarray:
        """The rows of a chunk in vectors_UE."""
        ends = np.cumsum([chunk.num_sequences for chunk in self.chunks])
        return np.arange(ends[number] - self.chunks[number].num_sequences, ends[number])


def embed_without_graph(
    model: Model,
    chunks: Sequence[PackedBatch],
    kept: int = 0,
    boundaries: int = 0,
    may_keep: Callable[[PackedBatch], bool] = lambda chunk: True,
    one_pass: OnePass = lambda last: nullcontext(),
) -> PassRecord:
    """Embed all chunks.

    Args:
        model: PackedBatch [B] -> vectors [B, E].
        chunks: the sequences, in the order of the vectors.
        kept: the number of chunks that keep their graph, counted from the last.
        boundaries: the number of chunks before them that save their boundary tensors (see
            `pyqemb.model.residual_stream.Boundaries`).
        may_keep: checks whether the graph of one of the last `kept` chunks may still be kept.
        one_pass: a context that is entered for every chunk.
    """
    device = device_of(model, chunks)
    record = PassRecord(torch.empty(0), list(chunks), Autocast.now(device), [] if is_stochastic(model) else None)
    first_kept = max(len(chunks) - kept, 0)
    vectors = []
    for number, chunk in enumerate(chunks):
        if record.states is not None:
            record.states.append(RngState.now(device))
        keep = number >= first_kept and may_keep(chunk)
        saved = Boundaries() if not keep and number >= first_kept - boundaries else None
        with one_pass(number == len(chunks) - 1), torch.set_grad_enabled(keep):
            vectors_BE = _embed(model, chunk, saved)
        if vectors_BE.requires_grad:
            record.graphs[number] = vectors_BE
        if saved is not None:
            record.boundaries[number] = saved
        vectors.append(vectors_BE.detach())
    record.vectors_UE = torch.cat(vectors)
    return record


def loss_and_cache(
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    vectors_UE: torch.Tensor,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss, detached, and `scale` times its gradient at the vectors, [U, E]; None if the loss is not finite.

    Parameters of the loss itself get their gradient here.
    """
    leaves_UE = vectors_UE.detach().requires_grad_()
    loss = loss_of(leaves_UE)
    if not torch.isfinite(loss):
        return loss.detach(), None
    return loss.detach(), gradient_at(leaves_UE, loss, scale)


def gradient_at(leaves_UE: torch.Tensor, loss: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """`scale` times the gradient of the loss at its leaves; parameters of the loss itself get theirs too."""
    torch.autograd.backward(loss, torch.full_like(loss, scale))
    return torch.zeros_like(leaves_UE) if leaves_UE.grad is None else leaves_UE.grad


def embed_with_cache(
    model: Model,
    record: PassRecord,
    cache_UE: torch.Tensor,
    one_pass: OnePass = lambda last: nullcontext(),
) -> None:
    """Propagate each chunk's part of the cached gradient back to the parameters.

    First the kept graphs run backward, which frees them. The other chunks are embedded again, with a graph, with the
    autocast and random state of the first pass. The record's graphs and boundaries are consumed. `one_pass` is a
    context that is entered for every chunk.
    """
    device = device_of(model, record.chunks)
    after = RngState.now(device) if record.states is not None else None
    parts = cache_UE.split([chunk.num_sequences for chunk in record.chunks])
    kept = sorted(record.graphs, reverse=True)
    order = (*kept, *(number for number in range(len(parts)) if number not in kept))
    for place, number in enumerate(order, start=1):
        with one_pass(place == len(order)):
            vectors_BE = record.graphs.pop(number, None)
            if vectors_BE is None:
                if record.states is not None:
                    record.states[number].restore(device)  # the same dropout masks as in the first pass
                with torch.enable_grad(), record.autocast.entered():
                    vectors_BE = _embed(model, record.chunks[number], record.boundaries.pop(number, None))
            if vectors_BE.requires_grad:  # unless all weights are frozen
                torch.autograd.backward(vectors_BE, parts[number])
            vectors_BE = None
    if after is not None:
        after.restore(device)


def rechunk(
    record: PassRecord, cache_UE: torch.Tensor, chosen: np.ndarray, budget: int
) -> tuple[PassRecord, torch.Tensor]:
    """Return a record and its cache with the sequences `chosen` in new chunks.

    `chosen` are rows of the cache. The chunks that kept their graph remain, next to the new ones.

    Not for models that draw random numbers: these belong to the old chunks.
    """
    chunks, order = pack_into_chunks(PackedBatch.concat(record.chunks).select(torch.from_numpy(chosen)), budget)
    rows, graphs = [chosen[order]], {}
    for number, graph in record.graphs.items():
        graphs[len(chunks)] = graph
        chunks.append(record.chunks[number])
        rows.append(record.rows(number))
    rows_U = to_device(torch.from_numpy(np.concatenate(rows)), cache_UE.device)
    return PassRecord(record.vectors_UE[rows_U], chunks, record.autocast, None, graphs), cache_UE[rows_U]


def device_of(model: Model, chunks: Sequence[PackedBatch]) -> torch.device:
    """Where the model draws its random numbers."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return chunks[0].device if parameter is None else parameter.device


def is_stochastic(model: Model) -> bool:
    """Whether two passes of the model differ unless the random state is put back."""
    if not isinstance(model, nn.Module):
        return False
    return any(m.training and m.p > 0 for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd))


def takes_boundaries(model: Model) -> bool:
    """Whether the model's forward pass has an argument `boundaries`."""
    function = model.forward if isinstance(model, nn.Module) else model
    return "boundaries" in inspect.signature(function).parameters


@contextmanager
def checkpointing(model: Model, on: bool) -> Iterator[None]:
    """Enable activation checkpointing in the parts of a model that support it, unless it is enabled already."""
    switched = [m for m in checkpointed_parts(model) if on and not m.checkpointing]
    for part in switched:
        part.checkpointing = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for part in switched:
            part.checkpointing = False  # type: ignore[assignment]


def checkpointed_parts(model: Model) -> list[nn.Module]:
    """The modules with an attribute `checkpointing`."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [m for m in modules if isinstance(getattr(m, "checkpointing", None), bool)]


def _embed(model: Model, chunk: PackedBatch, boundaries: Boundaries | None) -> torch.Tensor:
    return model(chunk) if boundaries is None else model(chunk, boundaries=boundaries)
