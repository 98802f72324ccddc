"""Processes that train together (torchrun): who they are and what they tell each other. One process alone is a world of one.

Legend: S texts of a batch, E dimension.
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pyqemb.errors import ConfigError

Value = TypeVar("Value")
_PATIENCE = timedelta(hours=2)  # the first process evaluates and saves while the others wait


@dataclass(frozen=True)
class World:
    """This process among `size`; every method is called by all of them alike."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> tuple[int, int]:
        """(first, number) of the part of a range that is this process's."""
        first, end = (count * rank // self.size for rank in (self.rank, self.rank + 1))
        return first, end - first

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, tensors: Iterable[Tensor]) -> None:
        """The .grad of each becomes its sum over all processes, in one message for each dtype; one that is missing counts as zeros."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
            by_dtype.setdefault(tensor.grad.dtype, []).append(tensor.grad)
        for gradients in by_dtype.values():
            total = self.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
            parts = total.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def gather(self, own_SE: Tensor, shares: Sequence[np.ndarray]) -> Tensor:
        """The vectors of all texts, [S, E], in their order, from those of each process's share; differentiable.

        Every process's gradient counts: what comes back is their sum.
        """
        return _Gather.apply(own_SE, self, shares) if self.size > 1 else own_SE

    def pass_on(self, tensor: Tensor, rows: int) -> Tensor:
        """Give a tensor to the next process, get one with `rows` rows from the one before."""
        if self.size == 1:
            return tensor
        received = tensor.new_empty(rows, *tensor.shape[1:])
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        for request in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, tensor.contiguous(), after), dist.P2POp(dist.irecv, received, before)]
        ):
            request.wait()
        return received

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            dist.barrier()

    def of_first(self, value: Value) -> Value:
        """The first process's value."""
        values: list[Any] = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_SE: Tensor, world: World, shares: Sequence[np.ndarray]) -> Tensor:
        width, dim = max(map(len, shares)), own_SE.shape[1]
        padded = own_SE.new_zeros(width, dim)
        padded[: len(own_SE)] = own_SE
        everything = own_SE.new_empty(world.size * width, dim)
        dist.all_gather_into_tensor(everything, padded)
        place_S = np.empty(sum(map(len, shares)), dtype=np.int64)
        for rank, share in enumerate(shares):
            place_S[share] = rank * width + np.arange(len(share))
        ctx.world, ctx.share = world, torch.from_numpy(shares[world.rank]).to(own_SE.device)
        return everything.index_select(0, torch.from_numpy(place_S).to(own_SE.device))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.world.sum(grads[0].contiguous().clone()).index_select(0, ctx.share), None, None


@contextmanager
def joined(device: str) -> Iterator[tuple[World, str]]:
    """The world that the environment describes (torchrun: RANK, WORLD_SIZE, LOCAL_RANK), and the device of this process.

    A process group that is there already is used and left alone.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if not dist.is_available() or (size == 1 and not dist.is_initialized()):
        yield World(), device
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        if ":" in device:
            raise ConfigError(f"train.device: several processes each take their own GPU, got {device!r}")
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    own_group = not dist.is_initialized()
    if own_group:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size()), device if on_gpu else "cpu"
        dist.barrier()  # nobody closes its connections while another still reads from them
    finally:
        # Hazard: a thread of gloo needs the interpreter's lock to let go of the last message. If it still waits for it when Python shuts
        # down, the process aborts.
        time.sleep(0.05)
        if own_group:
            dist.destroy_process_group()
