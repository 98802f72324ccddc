"""Tensors of which each rank holds some rows: DTensors of torch, sharded along their first dimension by FSDP2."""

import sys
from typing import Any

import torch


def is_sharded(x: Any) -> bool:
    """Whether a tensor is a DTensor."""
    tensor = sys.modules.get("torch.distributed.tensor")  # a second to import: only who makes shards does
    return tensor is not None and isinstance(x, tensor.DTensor)


def local(x: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a sharded tensor, sharing its memory; another tensor itself."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def own_rows(x: torch.Tensor) -> slice:
    """Which rows of the whole tensor `local` holds: torch.chunk gives every rank ceil(rows / ranks) or what is left."""
    if not is_sharded(x):
        return slice(0, len(x))
    mesh: Any = x.device_mesh  # type: ignore[attr-defined]
    each = -(-len(x) // mesh.size())
    start, end = (min(place * each, len(x)) for place in (mesh.get_local_rank(), mesh.get_local_rank() + 1))
    return slice(start, end)
