"""The memory cost of a token, measured on a few tokens. Legend: U sequences, E dimension.

A model on the meta device has the same costs without computing anything, because its ops know all shapes.
"""

import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyqemb.data.batch import PackedBatch
from pyqemb.model.residual_stream import Boundaries
from pyqemb.model.shards import local
from pyqemb.ops.checks import shapes_only
from pyqemb.training.grad_cache.passes import Model, checkpointing, takes_boundaries

# Tokens of the two probes: primes, so that no activation has the size of a weight's gradient.
_FEW, _MORE = 67, 131

_ALLOCATES = torch.ops.aten.empty.memory_format, torch.ops.aten.view.default


class TokenCosts(NamedTuple):
    """Bytes for each token of a chunk."""

    forward: float  # the peak of a pass without graph
    graph: float  # the graph
    backward: float  # the additional peak of the backward pass
    boundary: float  # boundary tensors; 0 for a model that has none
    vector: int  # the vector of a sequence


def measure(
    model: Model,
    stream: PackedBatch,
    parameters: Iterable[torch.Tensor],
    checkpointed: bool = False,
    device: str | None = None,
) -> TokenCosts:
    """Run two small chunks of the stream's tokens, forward and backward; their difference is the cost of a token.

    This adds to the gradients of the parameters, so the caller saves them before, and uses random numbers.

    `device`, "cpu" or "cuda", is the device on which a meta model would run (default: the device of the model).
    """
    existing = list(parameters)
    with checkpointing(model, checkpointed), nullcontext() if device is None else shapes_only(device):
        (few, _), (more, vector) = (_run(model, _sample(stream, tokens), existing) for tokens in (_FEW, _MORE))
    forward, graph, backward, boundary = (max(b - a, 0) / (_MORE - _FEW) for a, b in zip(few, more, strict=True))
    return TokenCosts(forward, graph, backward, boundary, vector)


def _sample(stream: PackedBatch, tokens: int) -> PackedBatch:
    """That many tokens of the stream in sequences of its mean length."""
    mean = max(stream.num_tokens // max(stream.num_sequences, 1), 1)
    ids = np.resize(stream.input_ids_T.cpu().numpy(), tokens).tolist()
    return PackedBatch.pack([ids[first : first + mean] for first in range(0, tokens, mean)])


def _run(model: Model, batch: PackedBatch, parameters: list[torch.Tensor]) -> tuple[list[float], int]:
    boundaries = Boundaries() if takes_boundaries(model) else None
    with _LiveBytes([*parameters, batch.input_ids_T, batch.positions_T, batch.cu_seqlens]) as live:
        with torch.no_grad():
            model(batch)
        forward = live.restart()
        if boundaries is not None:
            with torch.no_grad():
                model(batch, boundaries=boundaries)
        boundary = live.now
        boundaries = None
        before = live.now
        with torch.enable_grad():
            vectors_BE = model(batch)
        graph = live.now - before
        live.restart()
        if vectors_BE.requires_grad:
            torch.autograd.backward(vectors_BE, torch.zeros_like(vectors_BE))
        backward = live.restart() - before - graph
    return [forward, graph, max(backward, 0), boundary], vectors_BE.shape[1] * vectors_BE.element_size()


def _by_ops(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether new storages of this call are results of pyqemb's ops; others are results of torch's own ops.

    The ops allocate with torch, or view a block that torch does not know (pyqemb/ops/common.py: empty, empty_like).
    """
    if func is torch.ops.aten.empty_like.default:  # torch's dropout calls it too, without a memory format
        return kwargs.get("memory_format") is torch.contiguous_format
    return func in _ALLOCATES or func.namespace == "pyqemb"  # without values, an op is one torch call


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that torch allocates and frees.

    Gradients of `parameters`, recognized by their size, are not counted.

    Results of pyqemb's ops and of torch's are counted separately: on the CPU they come from two allocators, and neither
    can use the free memory of the other, so the peak is the sum of both.
    """

    def __init__(self, existing: list[torch.Tensor]):
        super().__init__()
        existing = [local(x) for x in existing]
        self._now, self._peak = [0, 0], [0, 0]
        self._known = {x.untyped_storage()._cdata for x in existing}
        self._gradients = {x.untyped_storage().nbytes() * wide for x in existing for wide in (1, 2)}

    @property
    def now(self) -> int:
        return sum(self._now)

    def restart(self) -> int:
        """Return the peak so far, and start a new one."""
        peak, self._peak = sum(self._peak), list(self._now)
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        own = _by_ops(func, kwargs or {})
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self._see(result.untyped_storage(), own)
        return results

    def _see(self, storage: torch.UntypedStorage, own: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        counted = 0 if size in self._gradients else size
        self._now[own] += counted
        self._peak[own] = max(self._peak[own], self._now[own])
        weakref.finalize(storage, self._forget, key, counted, own)

    def _forget(self, key: int, counted: int, own: bool) -> None:
        self._known.discard(key)
        self._now[own] -= counted
