"""Sharded tensors: DTensors of torch, sharded along their first dimension by FSDP2."""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def is_sharded(x: Any) -> bool:
    """Whether a tensor is a DTensor."""
    tensor = sys.modules.get("torch.distributed.tensor")  # a slow import, done only if there are shards
    return tensor is not None and isinstance(x, tensor.DTensor)


def has_shards(module: nn.Module) -> bool:
    """Whether a parameter of a module is sharded."""
    return any(map(is_sharded, module.parameters()))


def is_writer(module: nn.Module) -> bool:
    """Whether this process writes the weights of a module: rank 0, or any process that has all of them."""
    return not has_shards(module) or dist.get_rank() == 0


def local(x: torch.Tensor) -> torch.Tensor:
    """The rows of this rank of a sharded tensor, sharing its memory; any other tensor itself."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def own_rows(x: torch.Tensor) -> slice:
    """The rows of the whole tensor that `local` holds: torch.chunk gives every rank at most ceil(rows / ranks)."""
    if not is_sharded(x):
        return slice(0, len(x) if x.ndim else 1)
    mesh: Any = x.device_mesh  # type: ignore[attr-defined]
    each = -(-len(x) // mesh.size())
    start, end = (min(place * each, len(x)) for place in (mesh.get_local_rank(), mesh.get_local_rank() + 1))
    return slice(start, end)


@torch.no_grad()
def full_tensor(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """All rows of a sharded tensor, in its compute dtype; any other tensor itself, detached.

    For a sharded tensor this is a collective: all ranks that share it must call it.
    """
    whole: Any = x.detach()
    return whole.to(dtype).full_tensor() if is_sharded(x) else whole
