"""Planning of each step from the configuration, the costs measured by a probe, and the memory of earlier steps."""

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from pyqemb.data.batch import PackedBatch
from pyqemb.data.rank_logs import RANK_LOG
from pyqemb.training.grad_cache.chunks import chunk_tokens
from pyqemb.training.grad_cache.memory import free_bytes, give_back, gradients_aside, used_bytes
from pyqemb.training.grad_cache.passes import Model, RngState, checkpointed_parts, device_of
from pyqemb.training.grad_cache.plan import LARGEST_CHUNK, MARGIN, Plan, Sizes, choose, predict
from pyqemb.training.grad_cache.probe import TokenCosts, measure
from pyqemb.training.grad_cache.ranks import StepRanks

log = logging.getLogger("pyqemb")


class StepPlanner:
    """Plans the steps of a GradCache, and makes smaller plans when memory runs out.

    Args:
        given: the plan if `memory` is None.
        memory: bytes, or "auto"; None: `given` is used.
        gradients: the tensors whose .grad receives the gradients. tensors: all tensors whose .grad a backward pass
            changes.
        may_save: whether boundary tensors and kept graphs may be used.
        ranks: the ranks that use the same plan.
    """

    def __init__(
        self,
        model: Model,
        given: Plan,
        memory: int | Literal["auto"] | None,
        gradients: list[torch.Tensor],
        tensors: list[torch.Tensor],
        may_save: bool,
        ranks: StepRanks,
    ):
        self.ranks = ranks
        self.model, self.given, self.memory, self.may_save = model, given, memory, may_save
        self.gradients, self.tensors = gradients, tensors
        self._costs: dict[bool, TokenCosts] = {}  # by checkpointing
        self._budget, self._overhead = 0, 0  # bytes; overhead: use beyond prediction and budget
        self._limit: Plan | None = None  # the plan after a failed allocation
        self._announced: Any = None

    def plan(self, texts: PackedBatch) -> Plan:
        """The plan of a step over these distinct texts, before the ranks agree on one."""
        if self.memory is None:
            return replace(self.given, reshard=self.ranks.first_choice).within(self._limit)
        device = device_of(self.model, [texts])
        self._budget = self.memory if isinstance(self.memory, int) else int(MARGIN * free_bytes(device))
        plan = self.ranks.choose(self._budget, lambda reshard: self._choose(texts, device, reshard))
        # Texts are skipped in the second pass, which chunks that kept their graph do not have.
        return plan if self.may_save or not plan.kept else self.predicted(replace(plan, kept=0, peak_bytes=None), texts)

    def _choose(self, texts: PackedBatch, device: torch.device, reshard: bool) -> Plan:
        lengths = texts.lengths
        costs, sizes = self._standing(texts, reshard=reshard)
        return choose(
            self._budget,
            min(self.given.tokens_per_chunk, LARGEST_CHUNK[device.type]),
            int(lengths.max(initial=1)),
            lambda budget: chunk_tokens(lengths, budget),
            costs,
            sizes,
            (lambda: self._measured(texts, True)) if checkpointed_parts(self.model) else None,
            may_save=self.may_save,
            reshard=reshard,
        )

    def predicted(self, plan: Plan, texts: PackedBatch) -> Plan:
        """The plan with its predicted peak."""
        if plan.peak_bytes is not None:
            return plan
        tokens = chunk_tokens(texts.lengths, plan.tokens_per_chunk)
        return replace(plan, peak_bytes=predict(plan, tokens, *self._standing(texts, plan.checkpointing, plan.reshard)))

    def guard(self, texts: PackedBatch) -> Callable[[PackedBatch], bool]:
        """A function that decides whether a chunk may keep its graph, from the actual memory in use."""
        if self.memory is None:
            return lambda chunk: True
        device = device_of(self.model, [texts])
        start, costs = used_bytes(device), self._costs[False]

        def may_keep(chunk: PackedBatch) -> bool:
            needed = (costs.graph + costs.forward) * chunk.num_tokens
            return used_bytes(device) - start + needed <= self._budget

        return may_keep

    def smaller(self, plan: Plan, texts: PackedBatch, failed: BaseException) -> Plan:
        """The next plan after one that did not fit, the same on all ranks; raises `failed` if there is none."""
        gc.collect()
        give_back(device_of(self.model, [texts]))
        most, longest = (self.ranks.most(count) for count in (texts.num_tokens, int(texts.lengths.max(initial=1))))
        plan = replace(plan, tokens_per_chunk=min(plan.tokens_per_chunk, most))
        smaller = plan.smaller(longest, bool(checkpointed_parts(self.model)))
        if smaller is None:
            raise failed
        if self.memory is None:
            self._limit = smaller
        else:
            self._overhead += self._budget // 10
        reason = (str(failed) or type(failed).__name__).splitlines()[0]
        RANK_LOG.warning("gradient cache: out of memory (%s); trying again with %s", reason, smaller)
        return smaller

    def announce(self, plan: Plan, chunks: int) -> None:
        """Log the plan the first time, and when it changes by more than the difference between batches."""
        kept = round(10 * min(plan.kept, chunks) / max(chunks, 1))
        what = (plan.tokens_per_chunk, kept, plan.boundaries > 0, plan.checkpointing)
        if self.memory is not None and what != self._announced:
            self._announced = what
            log.info(plan.line(chunks))
            if plan.peak_bytes is not None and plan.peak_bytes > self._budget:
                RANK_LOG.warning("gradient cache: nothing fits into %s; trying the smallest plan", _mib(self._budget))

    def compare(self, predicted: int | None, measured: int) -> None:
        """If the step exceeded its budget, add the difference to the following predictions."""
        if measured > self._budget and predicted is not None:
            self._overhead += max(measured - predicted, 0)
            RANK_LOG.warning(
                "gradient cache: the step took %s, more than its %s; predictions are raised by %s",
                _mib(measured), _mib(self._budget), _mib(self._overhead),
            )  # fmt: skip

    def _standing(
        self, texts: PackedBatch, checkpointed: bool = False, reshard: bool = False
    ) -> tuple[TokenCosts, Sizes]:
        """The inputs of predictions."""
        costs = self._measured(texts, checkpointed)
        vectors = texts.num_sequences * costs.vector
        if self.ranks.is_sharded:
            return costs, self.ranks.sizes(reshard, vectors, self._overhead)
        gradients = [x.numel() * x.element_size() for x in self.gradients]
        return costs, Sizes(vectors, sum(gradients), max(gradients, default=0), self._overhead)

    def _measured(self, texts: PackedBatch, checkpointed: bool) -> TokenCosts:
        """The costs of a token, measured once; both kinds together, because all ranks have to run the model."""
        if not self._costs:
            device = device_of(self.model, [texts])
            random = RngState.now(device)
            self.ranks.begin(Plan(1, reshard=self.ranks.first_choice))
            with gradients_aside(self.tensors) as drop:
                known = [*self.tensors, *(self.model.parameters() if isinstance(self.model, nn.Module) else ())]
                for each in (False, True) if checkpointed_parts(self.model) else (False,):
                    self._costs[each] = measure(self.model, texts, known, each)
                    drop()
            self.ranks.end()
            random.restore(device)
        return self._costs[checkpointed]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
