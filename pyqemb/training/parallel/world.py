"""The ranks that train together (torchrun) and their collectives. A single process is a world of size 1.

Legend: S texts of a batch, E dimension.
"""

import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pyqemb.data.rank_logs import rank_logs
from pyqemb.errors import ConfigError, Interrupted, RankError
from pyqemb.model.device import gpu_is_usable
from pyqemb.training.parallel.heartbeat import Heartbeat, lost_message

Value = TypeVar("Value")
_FOREVER = timedelta(days=365)  # ranks wait while rank 0 saves; the heartbeat detects lost ranks
_BUCKET = 1 << 25  # bytes of gradients that are concatenated for one all-reduce
_all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name before torch 2.13
_MEETING = "pyqemb/meeting"  # a key of torchrun's store
_NAMED = 5  # values listed in an error
_FOLLOWS = 3.0  # seconds between a failed collective and the heartbeat's report of the lost rank


@dataclass(frozen=True)
class World:
    """This rank among `size`. Every method is a collective: all ranks call it."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"  # the device of the tensors in collectives

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def local_range(self, count: int) -> slice:
        """The part of 0..count that belongs to this rank."""
        start, end = (count * rank // self.size for rank in (self.rank, self.rank + 1))
        return slice(start, end)

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_gradients(self, tensors: Iterable[Tensor]) -> None:
        """Replace the .grad of each tensor by its sum over all ranks.

        A missing .grad counts as zeros.
        """
        if self.size == 1:
            return
        gradients = []
        for tensor in tensors:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
            gradients.append(tensor.grad)
        all_reduce_flat(gradients)

    def all_gather(self, own_SE: Tensor, partition: Sequence[np.ndarray]) -> Tensor:
        """The vectors of all texts, [S, E], in order, given those of this rank's texts; differentiable.

        The gradient of a vector is the sum of its gradients on all ranks.

        Args:
            own_SE: the vectors of this rank's texts, in the order of its part of `partition`.
            partition: the indices of the texts of each rank.
        """
        return _AllGather.apply(own_SE, self, partition) if self.size > 1 else own_SE

    def ring_shift(self, tensor: Tensor, rows: int) -> Tensor:
        """Send a tensor to the next rank, and receive one with `rows` rows from the previous rank."""
        if self.size == 1:
            return tensor
        received = tensor.new_empty(rows, *tensor.shape[1:])
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        for request in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, tensor.contiguous(), after), dist.P2POp(dist.irecv, received, before)]
        ):
            request.wait()
        return received

    def barrier(self) -> None:
        """Wait until all ranks have called it."""
        if self.size > 1:
            dist.barrier()

    def broadcast_object(self, value: Value) -> Value:
        """The value of rank 0, on all ranks."""
        values: list[Any] = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def broadcast_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of rank 0 by name, on the CPU of all ranks; the arguments of other ranks are ignored."""
        kinds = self.broadcast_object({name: (x.shape, x.dtype) for name, x in tensors.items()})
        received = {}
        for name, (shape, dtype) in kinds.items():
            own = tensors[name] if self.is_first else torch.empty(shape, dtype=dtype)
            if self.size > 1:
                data = own.contiguous().reshape(-1).view(torch.uint8).to(self.device)
                dist.broadcast(data, 0)
                own = data.cpu().view(dtype).reshape(shape)
            received[name] = own
        return received

    def gather_number(self, number: int) -> list[int]:
        """The number of each rank, on every rank."""
        if self.size == 1:
            return [number]
        numbers = torch.empty(self.size, dtype=torch.int64, device=self.device)
        _all_gather_single(numbers, torch.tensor([int(number)], device=self.device))
        return numbers.tolist()

    def gather_object(self, value: Value) -> list[Value]:
        """The value of each rank, on every rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def check_equal(self, facts: dict[str, Any]) -> None:
        """Raise a ConfigError on all ranks unless they have the same values.

        The error names each key that differs, the first rank with another value than rank 0, and both values.
        """
        everyone = self.gather_object(facts)
        different = []
        for name in sorted({name for each in everyone for name in each}):
            values = [each.get(name) for each in everyone]
            others = [rank for rank, value in enumerate(values) if value != values[0]]
            if others:
                also = f" ({len(others)} of {self.size} ranks differ from it)" if len(others) > 1 else ""
                different.append(f"rank {others[0]} has {name} = {values[others[0]]!r}, rank 0 has {values[0]!r}{also}")
        if different:
            more = f"; and {len(different) - _NAMED} more" if len(different) > _NAMED else ""
            raise ConfigError(
                f"{'; '.join(different[:_NAMED])}{more}: all ranks need the same configuration, files and versions"
            )


def all_reduce_flat(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace each tensor by its sum over the ranks of the group, with up to _BUCKET bytes per all-reduce."""
    bucket: list[Tensor] = []
    for place, tensor in enumerate(tensors):
        bucket.append(tensor)
        after = tensors[place + 1] if place + 1 < len(tensors) else None
        size = sum(x.numel() * x.element_size() for x in bucket)
        if after is not None and after.dtype == tensor.dtype and size + after.numel() * after.element_size() <= _BUCKET:
            continue
        total = torch.cat([x.reshape(-1) for x in bucket])
        dist.all_reduce(total, group=group)
        parts = total.split([x.numel() for x in bucket])
        torch._foreach_copy_(bucket, [part.view_as(x) for part, x in zip(parts, bucket, strict=True)])
        bucket = []


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_SE: Tensor, world: World, partition: Sequence[np.ndarray]) -> Tensor:
        width, dim = max(map(len, partition)), own_SE.shape[1]
        padded = own_SE.new_zeros(width, dim)
        padded[: len(own_SE)] = own_SE
        everything = own_SE.new_empty(world.size * width, dim)
        _all_gather_single(everything, padded)
        row_S = np.empty(sum(map(len, partition)), dtype=np.int64)
        for rank, texts in enumerate(partition):
            row_S[texts] = rank * width + np.arange(len(texts))
        ctx.world, ctx.own = world, torch.from_numpy(partition[world.rank]).to(own_SE.device)
        return everything.index_select(0, torch.from_numpy(row_S).to(own_SE.device))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.world.all_reduce_(grads[0].contiguous().clone()).index_select(0, ctx.own), None, None


@contextmanager
def joined(device: str, timeout: float = 45.0) -> Iterator[tuple[World, str]]:
    """Yield the world described by the environment, and the device of this process.

    torchrun sets the environment: RANK, WORLD_SIZE, LOCAL_RANK.

    An existing process group is used and not closed. If a rank does not start within `timeout` seconds, dies, or sends
    no heartbeat for that time, every other rank raises a RankError that names it; a rank that waits in a collective
    instead prints a line on stderr and exits with RankError's exit code. If a rank exits with an error, the others name
    that error and exit in the same way, with its exit code.
    """
    rank, size = rank_and_size()
    if not dist.is_available() or (size == 1 and not dist.is_initialized()):
        yield World(), device
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and gpu_is_usable())
    if on_gpu:
        if ":" in device:
            raise ConfigError(f"train.device: several processes each take their own GPU, got {device!r}")
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    own_group, on = not dist.is_initialized(), device if on_gpu else "cpu"
    store = _rendezvous(rank, size, timeout) if own_group else None
    world = World(rank, size, on) if own_group else World(dist.get_rank(), dist.get_world_size(), on)

    def broadcast(value: Any) -> Any:
        """The value of rank 0; sent through the store, not by a collective, before there is a process group."""
        if store is None:
            return world.broadcast_object(value)
        if world.is_first:
            store.set("heartbeat", json.dumps(value))
        return json.loads(store.get("heartbeat"))

    heartbeat = Heartbeat(world.rank, world.size, timeout, broadcast) if world.size > 1 else None
    failed: BaseException | None = None
    try:
        if own_group:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", store=store, rank=world.rank, world_size=size, timeout=_FOREVER
            )
        with rank_logs(world.rank, world.size):
            yield world, on
        dist.barrier()  # no rank closes its connections while another still reads from them
    except BaseException as error:
        failed = error
        if heartbeat is not None and is_of_a_collective(error):
            lost = heartbeat.wait_for_loss(_FOLLOWS) or f"a collective failed: {str(error).splitlines()[0]}"
            failed = RankError(lost_message(world.rank, lost), heartbeat.exit_code)
            raise failed from error
        if heartbeat is not None and heartbeat.lost is not None and isinstance(error, Interrupted):
            raise Interrupted(f"{error}; {heartbeat.lost}") from error
        raise
    finally:
        if heartbeat is not None:
            heartbeat.close(None if isinstance(failed, Interrupted) else failed)  # all ranks stop after the same step
        # A thread of gloo needs the GIL to release the last message. If it still waits for the GIL when Python shuts
        # down, the process aborts.
        time.sleep(0.05)
        if own_group and dist.is_initialized():
            dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """The rank and world size from the environment. ConfigError if torchrun did not set it."""
    size = _number("WORLD_SIZE", 1)
    return (_number("RANK") if size > 1 else 0), size


def _rendezvous(rank: int, size: int, timeout: float) -> dist.Store:
    """A store that all ranks have joined. RankError names the ranks that did not join in time."""
    address, port = os.environ.get("MASTER_ADDR"), _number("MASTER_PORT")
    if address is None:
        raise ConfigError(f"WORLD_SIZE is {size}, but MASTER_ADDR is not set; start the ranks with torchrun")
    # With torchrun, the agent hosts the store, which survives restarts.
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    patience = timedelta(seconds=timeout)
    end = time.monotonic() + timeout
    try:
        tcp = dist.TCPStore(
            address, port, size, rank == 0 and not hosted, patience, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        if rank == 0 and not hosted:
            raise RankError(f"rank 0 cannot listen at port {port}: {str(error).splitlines()[0]}") from error
        who = "the agent of torchrun does not answer" if hosted else f"rank 0 has not started within {timeout:g} s"
        raise RankError(f"{who}: no connection to {address}:{port}; rank {rank} stops") from error
    own, missing = uuid.uuid4().hex, set(range(size)) - {rank}
    with suppress(RuntimeError):  # rank 0 has given up or died, and cannot have seen more ranks than this rank
        if rank == 0:
            tcp.set(_MEETING, own)
        while time.monotonic() < end:
            group, missing = _meet(tcp, own, rank, size)
            if group is not None:
                return group
            time.sleep(0.05)
    names = " and ".join(f"rank {each}" for each in sorted(missing))
    raise RankError(f"{names} of {size} ranks did not start within {timeout:g} s; rank {rank} stops")


def _meet(store: dist.Store, own: str, rank: int, size: int) -> tuple[dist.Store | None, set[int]]:
    """The part of the store that all ranks have joined (None: not yet), and the missing ranks.

    torchrun's store survives restarts, and the agents of several machines count restarts differently. Each start of a
    rank therefore has a unique name. That of rank 0 is the prefix of the store, and rank 0 lists the names of all ranks
    there.
    """
    if not store.check([_MEETING]):
        return None, {0}
    group = dist.PrefixStore(f"{_MEETING}/{store.get(_MEETING).decode()}", store)
    group.set(f"rank {rank}", own)
    missing = {each for each in range(size) if not group.check([f"rank {each}"])}
    if rank == 0 and not missing:
        group.set("all", json.dumps([group.get(f"rank {each}").decode() for each in range(size)]))
    if group.check(["all"]) and json.loads(group.get("all"))[rank] == own:
        return group, set()
    return None, missing or {0}


def _number(name: str, default: int | None = None) -> int:
    """An environment variable of torchrun's."""
    text = os.environ.get(name, None if default is None else str(default))
    if text is None or not text.isdecimal():
        found = "is not set" if text is None else f"is {text!r}"
        raise ConfigError(f"the environment variable {name} {found}; start the ranks with torchrun")
    return int(text)


def is_of_a_collective(error: BaseException) -> bool:
    """Whether an error is a failed collective, which means that another rank is lost."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error).lower())
