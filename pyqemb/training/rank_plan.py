"""Memory, work and communication of each rank of a run, from shapes alone: `pyqemb train --dry-run --world N`.

Weights are not read, and neither the GPUs nor the other ranks have to exist.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from pyqemb.data.batch import PackedBatch
from pyqemb.errors import ConfigError
from pyqemb.model.packed_model import PackedModel
from pyqemb.training.config import ParallelSection, TrainConfig
from pyqemb.training.grad_cache.chunks import chunk_tokens
from pyqemb.training.grad_cache.plan import LARGEST_CHUNK, MARGIN, Phase, Plan, choose, peak_phase, predict
from pyqemb.training.grad_cache.probe import TokenCosts, measure
from pyqemb.training.groups import checkpoint_bytes, moment_bytes
from pyqemb.training.parallel.layout import (
    RankMemory,
    Unit,
    choose_reshard,
    loss_bytes,
    rank_memory,
    trained_units,
    units_of,
)
from pyqemb.training.preflight import in_units

_MOST_RANKS = 1024  # the largest number considered for advice


class Ranks(NamedTuple):
    """The ranks that a run is planned for."""

    world: int
    memory: int  # bytes of each


class Traffic(NamedTuple):
    """The collectives of one kind in a step: their number, and the bytes of their results, or inputs for reductions."""

    kind: str
    number: int
    nbytes: int


@dataclass(frozen=True)
class RankPlan:
    """A step of the rank with the most tokens.

    Attributes:
        replicas: copies of the weights; shard: the ranks that share one.
        memory: bytes by kind. standing: the bytes that are held between two steps.
        plan: the plan of the gradient cache. tokens: the tokens of each chunk.
        texts: the texts of the rank.
        phase: the part of the step in which memory is highest.
        available: the memory of the rank in bytes; budget: the bytes that the step was planned for.
        traffic: the collectives of a step.
    """

    replicas: int
    shard: int
    memory: RankMemory
    plan: Plan
    tokens: np.ndarray
    texts: int
    phase: Phase
    available: int
    budget: int
    traffic: list[Traffic]

    @property
    def peak(self) -> int:
        """The peak memory of the rank in bytes."""
        return self.memory.standing + self.memory.gathered + int(self.phase.total)

    @property
    def fits(self) -> bool:
        """Whether the step fits into its budget, and the rank into its memory."""
        return self.memory.gathered + self.phase.total <= self.budget and self.peak <= self.available


class RankPlanner:
    """Plans the steps of a model for any number of ranks; the cost of a token is measured once.

    Args:
        config: the configuration of the run.
        model: the model on the meta device; it is converted to `dtype`.
        dtype: the compute dtype.
        device: "cpu" or "cuda", where it would run.
        heaviest: a function of the number of ranks that returns the token counts of the rank with the most tokens.
        texts: the number of texts of all ranks.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: PackedModel,
        dtype: torch.dtype,
        device: str,
        heaviest: Callable[[int], np.ndarray],
        texts: int,
    ):
        self.train, self.parallel, self.dtype, self.device, self.texts = (
            config.train,
            config.parallel,
            dtype,
            device,
            texts,
        )
        self.heaviest = cache(heaviest)
        self._model = model.to(dtype)
        self._units = units_of(model)
        self.checkpoint = checkpoint_bytes(model, config.train)
        moments = {id(x): moment_bytes(name, x, config.train) for name, x in model.named_parameters()}
        self._moments_of: Callable[[nn.Parameter], int] = lambda parameter: moments[id(parameter)]
        self._measured = cache(self._measure)
        self._chunk_tokens = cache(lambda world, budget: chunk_tokens(self.heaviest(world), budget))

    def plan(self, ranks: Ranks, parallel: ParallelSection | None = None) -> RankPlan:
        """The plan of a rank. ConfigError: shard x replicate is not the number of ranks."""
        parallel = parallel or self.parallel
        replicas, shard = parallel.mesh(ranks.world)
        lengths, costs = self.heaviest(ranks.world), self._measured(False)
        vectors = len(lengths) * costs.vector
        ring = self.train.documents == "ring"
        loss = loss_bytes(vectors, self.texts * costs.vector, ranks.world, ring)
        average = self.train.ema_decay is not None
        memories = [
            rank_memory(self._units, shard, self.dtype, reshard, self._moments_of, average) for reshard in (False, True)
        ]
        left = ranks.memory - memories[0].standing
        budget = self._budget(left)

        def plan_of(reshard: bool) -> Plan:
            return self._plan(ranks.world, budget, memories[reshard], vectors, loss, reshard)

        reshard, plan = False, plan_of(False) if shard == 1 else None
        if plan is None:
            reshard, plan = choose_reshard(budget, plan_of, parallel.reshard_after_forward)
        memory, tokens = memories[reshard], self._chunk_tokens(ranks.world, plan.tokens_per_chunk)
        phase = peak_phase(plan, tokens, self._measured(plan.checkpointing), memory.sizes(vectors, loss))
        flat = Phase("all-reduce of the gradients", gradients=2 * memory.gradients)  # over the replicas, in one message
        if replicas > 1 and flat.total > phase.total + memory.gathered:
            phase, memory = flat, memory._replace(gathered=0)
        traffic = self._traffic(replicas, shard, plan, len(tokens), memory, ranks.world)
        return RankPlan(
            replicas, shard, memory, plan, tokens, len(lengths), phase,
            available=ranks.memory, budget=budget, traffic=traffic,
        )  # fmt: skip

    def _budget(self, left: int) -> int:
        """Bytes that a step may take if `left` bytes remain after weights and moments."""
        if isinstance(self.train.memory, int):
            return self.train.memory
        return left if self.train.memory is None else int(MARGIN * max(left, 0))

    def _plan(self, world: int, budget: int, memory: RankMemory, vectors: int, loss: int, reshard: bool) -> Plan:
        given, sizes = self.train.tokens_per_chunk, memory.sizes(vectors, loss)
        if self.train.memory is None:
            plan = Plan(given, reshard=reshard)
            return self._with_peak(plan, world, memory, vectors, loss)
        plan = choose(
            budget,
            min(given, LARGEST_CHUNK[self.device]),
            int(self.heaviest(world).max(initial=1)),
            lambda tokens: self._chunk_tokens(world, tokens),
            self._measured(False),
            sizes,
            lambda: self._measured(True),
            may_save=not self.train.skip_gradients,
            reshard=reshard,
        )
        if self.train.skip_gradients and plan.kept:  # a chunk that kept its graph has no second pass to skip
            plan = self._with_peak(replace(plan, kept=0), world, memory, vectors, loss)
        return plan

    def _with_peak(self, plan: Plan, world: int, memory: RankMemory, vectors: int, loss: int) -> Plan:
        tokens, costs = self._chunk_tokens(world, plan.tokens_per_chunk), self._measured(plan.checkpointing)
        return replace(plan, peak_bytes=predict(plan, tokens, costs, memory.sizes(vectors, loss)))

    def _measure(self, checkpointed: bool) -> TokenCosts:
        lengths = self.heaviest(1)
        mean = max(int(lengths.mean()) if len(lengths) else 1, 1)
        ids = np.arange(131) % self._model.config.vocab_size  # as many as the probe takes
        sample = PackedBatch.pack([ids[start : start + mean].tolist() for start in range(0, len(ids), mean)])
        return measure(self._model, sample, self._model.parameters(), checkpointed, self.device)

    def _traffic(
        self, replicas: int, shard: int, plan: Plan, chunks: int, memory: RankMemory, world: int
    ) -> list[Traffic]:
        """The collectives of a step, except those of a few numbers."""
        found = []
        if shard > 1:
            found += _sharded_traffic(
                self._units, self._model.config.num_hidden_layers, self.dtype.itemsize, plan, chunks
            )
        if replicas > 1:
            found.append(Traffic("all-reduces of gradients", 1, memory.gradients))
        if world > 1 and self.train.documents == "gather":
            vectors = self.texts * self._measured(False).vector
            found += [
                Traffic("all-gathers of vectors", 1, vectors),
                Traffic("all-reduces of the gradients of vectors", 1, vectors),
            ]
        return found


def _sharded_traffic(units: Sequence[Unit], layers: int, itemsize: int, plan: Plan, chunks: int) -> list[Traffic]:
    """The collectives of FSDP in a step; the first `layers` units are the decoder blocks."""
    sizes = [sum(x.numel() for x in unit) for unit in units]
    blocks = sizes[:layers]
    gathers, gathered = len(sizes), sum(sizes)
    if plan.reshard:  # for each chunk in both passes, and the blocks once more in the backward pass
        gathers = chunks * (2 * len(sizes) + len(blocks))
        gathered = chunks * (2 * sum(sizes) + sum(blocks))
    trained = [sum(x.numel() for x in unit) for unit in trained_units(units) if unit]
    return [
        Traffic("all-gathers of weights", gathers, itemsize * gathered),
        Traffic("reduce-scatters of gradients", chunks * len(trained), 4 * chunks * sum(trained)),
    ]


def lines(planner: RankPlanner, ranks: Ranks) -> Iterator[str]:
    """The lines about the ranks that `--dry-run --world N` prints.

    Raises:
        ConfigError: the run does not fit; the error has the numbers and settings that fit.
    """
    found = planner.plan(ranks)
    if not found.fits:
        raise ConfigError(_refusal(planner, ranks, found))
    memory, plan = found.memory, found.plan
    layout = f"{_counted(found.replicas, 'replica')} of {_counted(found.shard, 'shard')}"
    yield f"ranks      {ranks.world}: {layout}, {in_units(ranks.memory)} each"
    standing = _kinds(weights=memory.weights, moments=memory.moments, average=memory.average)
    yield f"rank       {in_units(memory.standing)} between steps: {standing}"
    yield f"           {in_units(found.peak)} at most, in the {found.phase.name}: {_kinds_at_the_peak(found)}"
    yield f"step       {sum(found.tokens):,.0f} tokens in {found.texts} texts on the rank with the most tokens"
    yield f"           {plan.line(len(found.tokens))}; budget {in_units(found.budget)}"
    if found.shard > 1 and not plan.reshard:
        yield "           weights are gathered once a step"
    for kind, number, nbytes in found.traffic:
        yield f"collective {kind}: {number} a step, {in_units(nbytes)}"
    yield f"checkpoint {in_units(planner.checkpoint)}, {in_units(planner.checkpoint / found.shard)} of each shard"


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'s' if number > 1 else ''}"


def _kinds(**kinds: float) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {in_units(size)}" for name, size in kinds.items() if size)


def _kinds_at_the_peak(found: RankPlan) -> str:
    memory, phase = found.memory, found.phase
    return _kinds(
        weights=memory.weights, moments=memory.moments, average=memory.average, gathered_weights=memory.gathered,
        gradients=phase.gradients, activations=phase.activations, embeddings=phase.vectors, loss=phase.loss,
        buffers=phase.gathering,
    )  # fmt: skip


def _refusal(planner: RankPlanner, ranks: Ranks, found: RankPlan) -> str:
    """The error message of a run that does not fit, with settings that fit."""
    needs = f"a rank needs {in_units(found.peak)}"
    advice = [_sharded_advice(planner, ranks, found)]
    if not any(not x.requires_grad for unit in planner._units for x in unit):
        advice.append("[lora] adapters")
    if found.memory.standing < found.available:
        advice.append("a smaller train.global_batch_size or model.max_length")
    if planner.train.memory != "auto":
        advice.append("train.memory = 'auto'")
    return (
        f"--gpu-memory: {needs} and has {in_units(found.available)}, a tenth of it beyond weights and moments kept "
        f"free: {_kinds_at_the_peak(found)}; {', or '.join(filter(None, advice))}"
    )


def _sharded_advice(planner: RankPlanner, ranks: Ranks, found: RankPlan) -> str | None:
    """The smallest number of shards, or else of ranks, that fits."""
    if planner.train.optimizer == "muon":
        return "train.optimizer = 'adamw' with parallel.shard"
    for world in (ranks.world * 2**n for n in range(11)):
        if world > max(_MOST_RANKS, ranks.world):
            break
        for shard in range(found.shard + 1 if world == ranks.world else 2, world + 1):
            if world % shard:
                continue
            parallel = ParallelSection(shard=shard, reshard_after_forward=planner.parallel.reshard_after_forward)
            if planner.plan(Ranks(world, ranks.memory), parallel).fits:
                more = "" if world == ranks.world else f" on {world} ranks"
                return f"parallel.shard = {shard}{more} fits"
    return None
