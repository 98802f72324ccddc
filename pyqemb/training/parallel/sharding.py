"""Sharded weights: each rank holds rows of every weight, gradient and moment; FSDP2 gathers and reduces them.

Source: torch.distributed.fsdp.fully_shard; docs/dev/sharding.md has the schedule and measurements.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pyqemb.data.batch import PackedBatch
from pyqemb.errors import ConfigError
from pyqemb.model.packed_model import PackedModel
from pyqemb.model.shards import local
from pyqemb.training.config import ParallelSection
from pyqemb.training.grad_cache.memory import CaughtError, catch_oom, return_large_blocks
from pyqemb.training.grad_cache.plan import Plan, Sizes
from pyqemb.training.grad_cache.ranks import StepRanks
from pyqemb.training.parallel.layout import choose_reshard, rank_memory, units_of
from pyqemb.training.parallel.world import World, all_reduce_flat

Reshard = Literal["auto", "always", "never"]


class Sharding(StepRanks):
    """A sharded model, and the ranks that hold its shards.

    The units that are gathered and reduced are each decoder block, the token embedding, and all other weights. The
    model's parameters become float32 DTensors; their gradients are sums over the ranks of a replica, not means.

    Args:
        model: an Embedder or a Reranker on the device of its shards, or on the meta device.
        mesh: a mesh with the dimensions "replicate" and "shard", see `make_mesh`.
        dtype: the compute dtype.
        world: all ranks.
        reshard: the value of `parallel.reshard_after_forward`.
    """

    is_sharded = True

    def __init__(
        self, model: PackedModel, mesh: DeviceMesh, dtype: torch.dtype, world: World, reshard: Reshard = "auto"
    ):
        _require("reset_iter_state", "set_reduce_scatter_unused_params")
        # Blocks return views, which are not changed in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        self.model, self.dtype, self.world, self.reshard = model, dtype, world, reshard
        self.group, self.replicas = mesh["shard"].get_group(), mesh["replicate"].get_group()
        if mesh.device_type == "cpu":
            return_large_blocks()
        narrow = dtype if dtype != torch.float32 else None
        policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
        decoder = model.model
        parts: list[nn.Module] = [*decoder.layers]
        if not model.reads_embedding:  # its weight is used only in its own forward pass
            parts.append(decoder.embed_tokens)
        for part in (*parts, model):
            fully_shard(part, mesh=mesh["shard"], mp_policy=policy)
        self.units = [cast(FSDPModule, part) for part in (*parts, model)]
        self.root = self.units[-1]
        self.collectives = Collectives()
        for unit in self.units:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
            unit.set_reduce_scatter_unused_params(True, recurse=False)
            unit.set_custom_all_gather(self.collectives.all_gather)
            unit.set_custom_reduce_scatter(self.collectives.reduce_scatter)
        # The backward pass of a table of rows does not need the rows; that of other parts of an embedding does.
        if not model.reads_embedding and not any(decoder.embed_tokens.children()):
            cast(FSDPModule, decoder.embed_tokens).set_unshard_in_backward(False)
        self._sizes = [rank_memory(units_of(model), self.group.size(), dtype, reshard) for reshard in (False, True)]
        self._reshards = False
        self._passes: dict[tuple[bool, bool], list[Call]] = {}  # collectives of a pass by (reshard, backward)

    def sizes(self, reshard: bool, vectors: int, overhead: int) -> Sizes:
        """The bytes of this rank that a plan needs."""
        return self._sizes[reshard].sizes(vectors, overhead=overhead)

    def choose(self, budget: int, plan_of: Callable[[bool], Plan]) -> Plan:
        """Choose a plan, given a function that returns the plan for each value of Plan.reshard."""
        return choose_reshard(budget, plan_of, self.reshard)[1]

    @property
    def first_choice(self) -> bool:
        """The value of Plan.reshard without planning."""
        return self.reshard == "always"

    def agree(self, plan: Plan) -> Plan:
        """The smallest of the ranks' plans, in each respect."""
        mine = [plan.tokens_per_chunk, plan.kept, plan.boundaries, not plan.checkpointing, not plan.reshard]
        tokens, kept, boundaries, plain, gathered = self._reduced(mine, dist.ReduceOp.MIN)
        same = Plan(tokens, kept if gathered else 0, boundaries, not plain, not gathered, plan.peak_bytes)
        return same if same == plan else replace(same, peak_bytes=None)

    def most(self, count: int) -> int:
        """The largest count of the ranks of this replica."""
        return self._reduced([count], dist.ReduceOp.MAX)[0]

    def begin(self, plan: Plan) -> None:
        """Gather the weights if the plan keeps them gathered."""
        self.end()
        shards = list(self.model.parameters())
        self._reshards = plan.reshard
        for unit in self.units[:-1]:
            unit.set_reshard_after_forward(plan.reshard, recurse=False)
        self.root.set_reshard_after_backward(plan.reshard)
        if not plan.reshard:
            self.gather()
        if (plan.reshard, True) not in self._passes:
            self._learn_passes(plan.reshard, shards)

    def end(self) -> None:
        """Free the gathered weights."""
        self.root.set_is_last_backward(True)
        for unit in self.units:
            unit.reshard()

    def gather(self) -> None:
        """Gather the weights of all units; each all-gather overlaps the copy of the previous unit."""
        before: Any = None
        for unit in self.units:
            handle = unit.unshard(async_op=True)
            if before is not None:
                before.wait()
            before = handle
        before.wait()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Context in which the weights are gathered, so that ranks may run forward passes independently."""
        self.begin(Plan(1))
        try:
            yield
        finally:
            self.end()

    @contextmanager
    def attempt(self, passes: int, backward: bool) -> Iterator[CaughtError]:
        """Context of passes that may run out of memory; this rank then still joins all remaining collectives."""
        self.collectives.start()
        with catch_oom() as caught:
            yield caught
        if caught.error is not None:
            self._abandon()
            self.collectives.complete(self._passes[self._reshards, backward] * passes)
        if self.most(caught.error is not None) and caught.error is None:
            self._abandon()
            caught.error = MemoryError("another rank ran out of memory")

    @contextmanager
    def one_pass(self, last: bool) -> Iterator[None]:
        """Context of the pass of one chunk; every pass has the same collectives."""
        self.root.set_is_last_backward(last)
        yield
        if self._reshards:
            self.root.reshard()  # FSDP keeps the root's weights after a forward pass

    def _abandon(self) -> None:
        """Reset FSDP after a failed attempt, including the gradients of a unit that was not reduced."""
        for parameter in self.model.parameters():
            if not isinstance(parameter, DTensor):
                parameter.grad = None
        self.root.reset_iter_state()

    def all_reduce_gradients(self, tensors: Iterable[Tensor]) -> None:
        """Sum the .grad of each tensor over the ranks that were not reduced over: shards over the replicas."""
        tensors = list(tensors)
        self.world.all_reduce_gradients(x for x in tensors if not isinstance(x, DTensor))
        if self.replicas.size() > 1:
            shards = [x.grad for x in tensors if isinstance(x, DTensor) and x.grad is not None]
            all_reduce_flat([local(shard) for shard in shards], self.replicas)

    def _learn_passes(self, reshard: bool, shards: list[nn.Parameter]) -> None:
        """Run passes over an empty batch and store their collectives, which are those of every pass.

        A rank that runs out of memory uses this list to take part in the remaining collectives of the pass.
        """
        nothing = PackedBatch.pack([]).to(self.model.device)
        before = [x.grad for x in shards]
        for backward in (False, True):
            self.collectives.start()
            with self.one_pass(last=True), torch.set_grad_enabled(backward):
                vectors = self.model(nothing)
                if vectors.requires_grad:
                    torch.autograd.backward(vectors, torch.zeros_like(vectors))
            self._passes[reshard, backward] = list(self.collectives.calls)
        for x, grad in zip(shards, before, strict=True):
            x.grad = grad

    def _reduced(self, values: Sequence[int], op: Any) -> list[int]:
        message = torch.tensor([int(value) for value in values], device=self.model.device)
        dist.all_reduce(message, op, group=self.group)
        return message.tolist()


class Call(NamedTuple):
    """A collective of FSDP: its buffers and its operation."""

    run: Callable[..., Any]
    output: torch.Size
    input: torch.Size
    dtype: torch.dtype
    device: torch.device
    arguments: tuple[Any, ...]


class Collectives:
    """FSDP's all-gathers and reduce-scatters: executed by torch, counted, and listed since the last `start`.

    `counts` holds the number of calls by kind since the model was created.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.counts: Counter[str] = Counter()
        self.all_gather: Any = _Comm(self, "all_gather", dist.all_gather_single)
        self.reduce_scatter: Any = _Comm(self, "reduce_scatter", dist.reduce_scatter_single)

    def start(self) -> None:
        """Start a new list of calls."""
        self.calls.clear()

    def complete(self, expected: Sequence[Call]) -> None:
        """Execute, with zeros, the expected calls that are not in the list yet."""
        for call in expected[len(self.calls) :]:
            output, given = (torch.zeros(size, dtype=call.dtype, device=call.device) for size in call[1:3])
            call.run(output, given, *call.arguments)


class _Comm:
    """One kind of collective, with FSDP's interface (AllGather, ReduceScatter of torch.distributed.fsdp)."""

    def __init__(self, log: Collectives, kind: str, run: Callable[..., Any]):
        self._log, self._kind, self._run = log, kind, run

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate a buffer."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any = None,
        async_op: bool = False,
    ) -> Any:
        """Run the collective."""
        arguments = (group,) if op is None else (op, group)
        work = self._run(output_tensor, input_tensor, *arguments, async_op=async_op)
        self._log.counts[self._kind] += 1
        self._log.calls.append(
            Call(self._run, output_tensor.shape, input_tensor.shape, input_tensor.dtype, input_tensor.device, arguments)
        )
        return work


def make_mesh(section: ParallelSection, world: World, device: torch.device) -> DeviceMesh:
    """The ranks by replica and by shard. ConfigError: shard x replicate is not the number of ranks."""
    return init_device_mesh(device.type, section.mesh(world.size), mesh_dim_names=("replicate", "shard"))


def _require(*names: str) -> None:
    if missing := [name for name in names if not hasattr(FSDPModule, name)]:
        raise ConfigError(
            f"parallel.shard: torch {torch.__version__} has no {missing[0]} of FSDP2; expected 2.13 or newer"
        )
