"""The plan of a step (chunk size, kept graphs, boundary tensors, checkpointing), its predicted peak, and its choice.

The memory model is in docs/dev/grad_cache.md. Legend: U sequences, E dimension.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from pyqemb.training.grad_cache.probe import TokenCosts

# The share of a second forward pass that boundary tensors save: o_proj and down_proj hold a third of a layer's weights.
_BOUNDARY_SAVING = 1 / 3
LARGEST_CHUNK = {"cpu": 4096, "cuda": 16384}  # tokens; larger chunks are not faster
MARGIN = 0.9  # share of the free memory: the budget of "auto"
# With shards every chunk ends with a reduce-scatter of all gradients (4 bytes per parameter). It takes as long as this
# many forward passes of a token (2 operations per parameter), at 4e14 operations and 1e11 bytes per second. If the
# weights are resharded, three all-gathers (2 bytes per parameter each) precede it.
_REDUCTION, _GATHERS = 8000, 12000


@dataclass(frozen=True)
class Plan:
    """How a step uses its memory.

    Attributes:
        tokens_per_chunk: the tokens of one pass through the model; a longer sequence gets its own chunk.
        kept: the number of chunks that keep the graph of their first pass; all if it exceeds the number of chunks.
        boundaries: the number of other chunks that store boundary tensors, which save a third of their second forward
            pass.
        checkpointing: whether activations are recomputed in the backward pass.
        reshard: whether the gathered weights of a sharded model are freed after each unit; then every pass gathers
            them, and no graph is kept. False: they stay gathered during the step.
        peak_bytes: the predicted increase of memory over the start of the step; None if not predicted.
        cost: the work of the step, in forward passes of a token; only to compare plans of the same texts.
    """

    tokens_per_chunk: int
    kept: int = 0
    boundaries: int = 0
    checkpointing: bool = False
    reshard: bool = False
    peak_bytes: int | None = None
    cost: float = field(default=0.0, compare=False, repr=False)

    def smaller(self, longest: int, can_checkpoint: bool) -> "Plan | None":
        """Return the plan to try when this one did not fit.

        It has fewer graphs, no boundary tensors, smaller chunks, or checkpointing, in this order.
        """
        if self.kept:
            return replace(self, kept=self.kept // 2, peak_bytes=None)
        if self.boundaries:
            return replace(self, boundaries=0, peak_bytes=None)
        if self.tokens_per_chunk > longest:
            return replace(self, tokens_per_chunk=max(self.tokens_per_chunk // 2, longest), peak_bytes=None)
        if can_checkpoint and not self.checkpointing:
            return replace(self, checkpointing=True, peak_bytes=None)
        return None

    def within(self, limit: "Plan | None") -> "Plan":
        """This plan, limited to `limit` in every respect."""
        if limit is None:
            return self
        return replace(
            self,
            tokens_per_chunk=min(self.tokens_per_chunk, limit.tokens_per_chunk),
            kept=min(self.kept, limit.kept),
            boundaries=min(self.boundaries, limit.boundaries),
            checkpointing=self.checkpointing or limit.checkpointing,
            reshard=self.reshard or limit.reshard,
        )

    def line(self, chunks: int) -> str:
        """The plan as a line for the log."""
        kept = min(self.kept, chunks)
        parts = [f"{chunks} chunks of up to {self.tokens_per_chunk} tokens", f"{kept} keep their graph"]
        if self.boundaries:
            parts.append(f"{min(self.boundaries, chunks - kept)} leave boundary tensors")
        if self.checkpointing:
            parts.append("activation checkpointing")
        if self.reshard:
            parts.append("weights gathered in every pass")
        if self.peak_bytes is not None:
            parts.append(f"predicted peak {self.peak_bytes / 2**20:,.0f} MiB over the start of the step")
        return "gradient cache: " + ", ".join(parts)


class Sizes(NamedTuple):
    """The inputs of a prediction other than the costs of a token, in bytes."""

    vectors: int  # all vectors [U, E]
    gradients: int  # of all parameters, between two chunks; of sharded parameters, this rank's shards
    largest: int  # the largest of these gradients; 0 with shards
    overhead: int = 0  # what earlier steps took beyond the prediction
    gathered: int = 0  # sharded weights in the compute dtype, the most that are gathered at a time
    gathering: int = 0  # the largest buffer while all weights are gathered before the first pass
    reduction: int = 0  # with shards: the gradients of one unit before their reduce-scatter, and its buffer
    loss: int = 0  # the peak of the loss; 0: six times `vectors`
    trained: float = 1.0  # share of the parameters whose gradients are reduced


class Phase(NamedTuple):
    """The peak memory of a part of a step by kind, in bytes over the start of the step."""

    name: str
    vectors: float = 0.0
    activations: float = 0.0
    gradients: float = 0.0  # including their reduction
    loss: float = 0.0
    gathering: float = 0.0

    @property
    def total(self) -> float:
        """The sum of all kinds."""
        return self.vectors + self.activations + self.gradients + self.loss + self.gathering


def predict(plan: Plan, tokens: Sequence[int] | np.ndarray, costs: TokenCosts, sizes: Sizes) -> int:
    """The peak increase of memory over the start of a step, in bytes.

    Args:
        plan: how the step uses its memory.
        tokens: the number of tokens of each chunk, in order.
        costs: bytes for each token.
        sizes: bytes that do not depend on the chunks.
    """
    return int(peak_phase(plan, tokens, costs, sizes).total) + sizes.gathered + sizes.overhead


def peak_phase(plan: Plan, tokens: Sequence[int] | np.ndarray, costs: TokenCosts, sizes: Sizes) -> Phase:
    """The phase of a step with the highest memory; arguments as in `predict`."""
    phases = _phases(plan, np.asarray(tokens, dtype=np.float64), costs, sizes)
    return max(phases, key=lambda phase: phase.total)


def _phases(plan: Plan, tokens: np.ndarray, costs: TokenCosts, sizes: Sizes) -> Iterator[Phase]:
    """The peak of each phase of a step."""
    kept = min(plan.kept, len(tokens))
    other, keeping = tokens[: len(tokens) - kept], tokens[len(tokens) - kept :]
    saving = other[len(other) - min(plan.boundaries, len(other)) :]
    held = costs.boundary * saving.sum() + costs.graph * keeping.sum()  # boundary tensors and graphs
    if sizes.gathering:
        yield Phase("gathering of the weights", gathering=sizes.gathering)
    # 1. The first pass: everything that is held at its end, and the running chunk.
    yield Phase("first pass", sizes.vectors, held + costs.forward * tokens.max(initial=0))
    # 2. The loss: the vectors in the caller's order, their gradients, and as much again for the loss itself.
    yield Phase("loss", 0, held, loss=sizes.loss or 6 * sizes.vectors)
    # The largest gradient, that of the token embeddings, and the next chunk's contribution to it do not come from the
    # graph's allocator, so they cannot use memory that the graph has freed.
    beside = sizes.reduction + sizes.largest * min(len(tokens), 2)
    gradients = sizes.gradients - sizes.largest

    def backward(activations: float, summed: bool) -> Phase:
        return Phase("backward pass", 2 * sizes.vectors, activations, beside + (gradients if summed else 0))

    # 3. Backward through the kept graphs, the last first. The first one allocates the gradients while its graph is
    # freed.
    for number, count in enumerate(keeping[::-1]):
        yield backward(held + costs.backward * count, number > 0)
        held -= costs.graph * count
        yield backward(held, True)
    # 4. The other chunks again: the graph of a chunk replaces its boundary tensors.
    for number, count in enumerate(other):
        held -= costs.boundary * count if number >= len(other) - len(saving) else 0
        yield backward(held + (costs.graph + costs.backward) * count, number > 0 or kept > 0)
        yield backward(held, True)


def choose(
    budget: int,
    largest_chunk: int,
    longest: int,
    chunks_of: Callable[[int], Sequence[int] | np.ndarray],
    costs: TokenCosts,
    sizes: Sizes,
    checkpointed: Callable[[], TokenCosts] | None = None,
    may_save: bool = True,
    reshard: bool = False,
) -> Plan:
    """The plan with the least recomputation among those that fit; the smallest plan if none fits.

    Chunks are halved before activations are checkpointed. With shards, where each chunk costs communication, the
    cheaper of the two is used.

    Args:
        budget: bytes that the step may take over its start.
        largest_chunk: the number of tokens above which chunks are not faster.
        longest: the number of tokens of the longest sequence.
        chunks_of: tokens_per_chunk -> the tokens of each chunk.
        costs: bytes for each token, without activation checkpointing.
        sizes: bytes that do not depend on the chunks.
        checkpointed: measures the costs with activation checkpointing; None if the model does not support it.
        may_save: whether boundary tensors may be used.
        reshard: see `Plan`.
    """
    tried = [largest_chunk]
    while tried[-1] > longest:
        tried.append(max(tried[-1] // 2, longest))
    fitting: list[Plan] = []
    for checkpointing in (False, True):
        if checkpointing and (checkpointed is None or (fitting and not sizes.gathered)):
            break
        if checkpointing and checkpointed is not None:
            costs = checkpointed()
        for size in tried:
            tokens = np.asarray(chunks_of(size))

            def peak(plan: Plan, tokens: np.ndarray = tokens, costs: TokenCosts = costs) -> int:
                return predict(plan, tokens, costs, sizes)

            plan = Plan(size, checkpointing=checkpointing, reshard=reshard)
            if peak(plan) <= budget:
                if not checkpointing:
                    plan = _filled(plan, tokens, lambda plan: peak(plan) <= budget, may_save and costs.boundary > 0)
                fitting.append(replace(plan, peak_bytes=peak(plan), cost=_cost(plan, tokens, sizes)))
                break
    return min(fitting, key=lambda plan: plan.cost) if fitting else replace(plan, peak_bytes=peak(plan))


def _cost(plan: Plan, tokens: np.ndarray, sizes: Sizes) -> float:
    """The work of a step: forward, backward (counted as two), recomputation, and the communication of shards."""
    passes = (4 + plan.checkpointing) * float(tokens.sum()) - _spared(plan, tokens)
    return passes + len(tokens) * (_REDUCTION * sizes.trained + _GATHERS * plan.reshard if sizes.gathered else 0)


def _spared(plan: Plan, tokens: np.ndarray) -> float:
    """The forward passes of a token that kept graphs and boundary tensors save."""
    other = len(tokens) - min(plan.kept, len(tokens))
    saving = tokens[max(other - plan.boundaries, 0) : other]
    return float(tokens[other:].sum() + _BOUNDARY_SAVING * saving.sum())


def _filled(plan: Plan, tokens: np.ndarray, fits: Callable[[Plan], bool], may_save: bool) -> Plan:
    """The plan with the kept graphs and boundary tensors that save most work.

    Either boundary tensors or graphs save more per byte, the same for all chunks, so both orders are tried.
    """
    most = len(tokens)

    def with_graphs(plan: Plan) -> Plan:
        if plan.reshard:
            return plan
        kept = bisect_left(range(1, most + 1), True, key=lambda kept: not fits(replace(plan, kept=kept)))
        return replace(plan, kept=kept)

    def with_boundaries(plan: Plan) -> Plan:
        if not may_save:
            return plan
        counts = range(1, most + 1 - plan.kept)
        return replace(plan, boundaries=bisect_left(counts, True, key=lambda n: not fits(replace(plan, boundaries=n))))

    both = with_graphs(with_boundaries(plan)), with_boundaries(with_graphs(plan))
    best = max(both, key=lambda plan: _spared(plan, tokens))
    return replace(best, boundaries=min(best.boundaries, most - best.kept))
