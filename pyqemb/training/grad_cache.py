"""Gradient caching: the gradients of one big batch in the memory of one chunk, or in as much memory as there is.

Source: Gao et al., arXiv 2101.06983; the schedule, the planner and what they cost are in docs/grad_cache.md.
Legend: B queries, M documents, S sequences of a stream, U distinct ones, E dimension.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from pyqemb.data.batch import PackedBatch, to_device
from pyqemb.ops import checks
from pyqemb.training import passes
from pyqemb.training.budget import StepPlanner, chunk_tokens
from pyqemb.training.chunks import cut, distinct
from pyqemb.training.memory import Attempt, Meter, gradients_aside
from pyqemb.training.passes import Model, Record, RngState
from pyqemb.training.passes import embed_with_cache as embed_with_cache
from pyqemb.training.passes import embed_without_graph as embed_without_graph
from pyqemb.training.passes import loss_and_cache as loss_and_cache
from pyqemb.training.planner import Plan as Plan
from pyqemb.training.skipping import without_the_least

LossFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LossOf = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class StepReport:
    """What a step did. Bytes are growth over the start of the step, None where nobody predicted or measured."""

    plan: Plan
    sequences: int
    distinct: int  # sequences that were encoded
    tokens: int  # of those
    chunks: int
    fill: float  # mean share of tokens_per_chunk in all chunks but the last
    kept: int = 0  # chunks that kept their graph
    predicted_bytes: int | None = None
    measured_bytes: int | None = None
    replans: int = 0
    skipped_texts: float = 0.0  # share of the distinct texts that had no second pass,
    skipped_tokens: float = 0.0  # of their tokens,
    skipped_norm: float = 0.0  # and of the summed norm of the cached gradients


class GradCache:
    """One training step of any batch size.

    Equal to the same loss without caching up to rounding, whatever the chunks and whatever is kept. Equal token sequences are
    encoded once, unless the model draws random numbers. A step that runs out of memory is cut smaller and repeated.

    Args:
        model: PackedBatch [B] -> vectors [B, E]. One that takes `boundaries` (the Embedder does) can spare recomputation.
        loss_fn: (queries_BE, documents_ME) -> scalar, differentiable; may have parameters of its own. Only `step_stream` works
            without it.
        tokens_per_chunk: tokens of one pass, with `memory` at most; a longer sequence has one of its own.
        plan: what to do with the memory, taken as it is.
        memory: bytes that a step may take over its start, or "auto": nine tenths of what is free. The planner then chooses
            chunks, kept graphs, boundary tensors and checkpointing. None: nothing is kept.
        skip: share of the summed norm of the cached gradients that may be left out: the texts with the smallest have no
            second pass. Not exact; 0 skips nothing.
        parameters: the tensors whose .grad the gradients end up in, where they are not those of the model.
        agree: the loss on which all processes agree, given each one's own; decides whether it is finite.
        say: called with a line for the log when the plan changes or did not fit.

    Raises:
        ValueError: tokens_per_chunk below 1; skip outside 0..1 or with a model that draws random numbers; `plan` beside `memory`.

    `last` is the StepReport of the last step.
    """

    def __init__(
        self,
        model: Model,
        loss_fn: LossFn | None = None,
        tokens_per_chunk: int = 8192,
        *,
        plan: Plan | None = None,
        memory: int | Literal["auto"] | None = None,
        skip: float = 0.0,
        parameters: Iterable[torch.Tensor] | None = None,
        agree: Callable[[torch.Tensor], torch.Tensor] | None = None,
        say: Callable[[str], None] | None = None,
    ):
        for name, value in (("model", model), ("loss_fn", loss_fn), ("agree", agree), ("say", say)):
            if not callable(value) and (value is not None or name == "model"):
                raise TypeError(f"[GradCache] {name} must be callable, got {type(value).__name__}")
        checks.integer("GradCache", "tokens_per_chunk", tokens_per_chunk, 1)
        if plan is not None and not isinstance(plan, Plan):
            raise TypeError(f"[GradCache] plan must be a Plan, got {type(plan).__name__}")
        if not 0 <= checks.number("GradCache", "skip", skip) < 1:
            raise ValueError(f"[GradCache] skip must lie in 0..1, got {skip}")
        if memory is not None and plan is not None:
            raise ValueError("memory and plan exclude each other: one is chosen from the other")
        automatic = memory is None or (isinstance(memory, str) and memory == "auto")
        if not automatic and (isinstance(memory, bool) or not isinstance(memory, int) or memory <= 0):
            raise ValueError(f"[GradCache] memory must be a number of bytes, 'auto' or None, got {memory!r:.100}")
        self.model, self.loss_fn, self.memory, self.skip = model, loss_fn, memory, skip
        self.agree = agree or (lambda loss: loss)
        self.say = say or (lambda line: None)
        self.last: StepReport | None = None
        own: list[torch.Tensor] = list(model.parameters()) if isinstance(model, nn.Module) else []
        gradients = [p for p in own if p.requires_grad] if parameters is None else _tensors(parameters)
        self._tensors = list({id(x): x for x in (*gradients, *own)}.values())  # whose .grad a backward pass touches
        self._planner = StepPlanner(
            model, plan or Plan(tokens_per_chunk), memory, gradients, self._tensors, not skip, self.say
        )

    def step(self, queries: PackedBatch, documents: PackedBatch, scale: float = 1.0) -> torch.Tensor:
        """Add `scale` times the gradients of the loss over the whole batch to the .grad of the parameters.

        Returns the loss, detached and not scaled. A loss that is not finite adds no gradient.

        Raises:
            ValueError: no queries or no documents.
        """
        joined = _joined(queries, documents)
        return self.step_stream(joined, self._pair_loss(queries), scale)

    def step_stream(self, stream: PackedBatch, loss_of: LossOf, scale: float = 1.0) -> torch.Tensor:
        """`step` for one stream of texts: `loss_of` takes their vectors [S, E]. The stream may be empty."""
        _check_batch("stream", stream)
        if not callable(loss_of):
            raise TypeError(f"[GradCache] loss_of must be callable, got {type(loss_of).__name__}")
        scale = checks.finite("GradCache", "scale", scale)
        meter = Meter(passes.device_of(self.model, [stream]))
        with meter if self.memory is not None else nullcontext():
            record, place_S, report = self._first_pass(stream)
            loss, cache_UE = loss_and_cache(
                lambda vectors_UE: loss_of(vectors_UE.index_select(0, place_S)), record.vectors_UE, scale, self.agree
            )
            if cache_UE is not None:
                self._second_pass(record, report, cache_UE)
        if self.memory is not None:
            report.measured_bytes = meter.peak_bytes
            self._planner.compare(report.predicted_bytes, meter.peak_bytes)
        self.last = report
        return loss

    def __call__(self, queries: PackedBatch, documents: PackedBatch) -> torch.Tensor:
        """The loss; its backward runs the second pass.

        So it can be scaled, added to other losses, and several can go before one backward. `agree` has no part in it; memory is
        planned but its peak is not measured.
        """
        joined, loss_of = _joined(queries, documents), self._pair_loss(queries)
        record, place_S, report = self._first_pass(joined)
        self.last = report
        leaves_UE = record.vectors_UE.detach().requires_grad_()
        leaves_UE.register_hook(lambda cache_UE: self._second_pass(record, report, cache_UE))
        return loss_of(leaves_UE.index_select(0, place_S))

    def planned(self, stream: PackedBatch) -> Plan:
        """The plan of a step over a stream of distinct texts, with its predicted peak; costs a probe the first time."""
        _check_batch("stream", stream)
        return self._planner.predicted(self._planner.plan(stream), stream)

    def preview(self, stream: PackedBatch) -> str:
        """`planned`, in a line."""
        plan = self.planned(stream)
        return plan.line(len(chunk_tokens(stream.lengths, plan.tokens_per_chunk)))

    def _pair_loss(self, queries: PackedBatch) -> LossOf:
        loss_fn, count = self.loss_fn, queries.num_sequences
        if loss_fn is None:
            raise ValueError("[GradCache] expected a loss_fn: without one only step_stream works")
        return lambda vectors_SE: loss_fn(vectors_SE[:count], vectors_SE[count:])

    def _first_pass(self, stream: PackedBatch) -> tuple[Record, torch.Tensor, StepReport]:
        """The record, where in its vectors each sequence of the stream finds its own, and the report so far."""
        is_stochastic = passes.is_stochastic(self.model)
        if is_stochastic and self.skip:
            raise ValueError(
                "skip needs a model that draws no random numbers: its texts are packed anew for the second pass"
            )
        # Two copies of a text must see two dropout masks.
        first_U, same_S = (np.arange(stream.num_sequences),) * 2 if is_stochastic else distinct(stream)
        texts = stream if len(first_U) == len(same_S) else stream.select(torch.from_numpy(first_U))
        device, planner = passes.device_of(self.model, [stream]), self._planner
        random = RngState.now(device) if is_stochastic else None
        plan, replans = planner.plan(texts), 0
        while True:
            chunks, order_U = cut(texts, plan.tokens_per_chunk)
            planner.announce(plan, len(chunks))
            kept = 1 if len(chunks) == 1 else plan.kept  # a single graph takes no more than a second pass would
            with Attempt() as attempt:
                record = passes.embed_without_graph(self.model, chunks, kept, plan.boundaries, planner.guard(texts))
            if attempt.failed is None:
                break
            plan, replans = planner.smaller(plan, texts, attempt.failed), replans + 1
            if random is not None:
                random.restore(device)
        row_U = np.empty_like(order_U)
        row_U[order_U] = np.arange(len(order_U))
        report = StepReport(
            plan, stream.num_sequences, len(first_U), texts.num_tokens, len(chunks), _fill(chunks, plan),
            len(record.graphs), plan.peak_bytes, replans=replans,
        )  # fmt: skip
        return record, to_device(torch.from_numpy(row_U[same_S]), record.vectors_UE.device), report

    def _second_pass(self, record: Record, report: StepReport, cache_UE: torch.Tensor) -> None:
        """embed_with_cache; cut smaller and repeated, from the gradients as they were, while memory does not suffice."""
        plan = report.plan
        if self.skip:
            record, cache_UE, skipped = without_the_least(record, cache_UE, self.skip, plan.tokens_per_chunk)
            report.skipped_texts, report.skipped_tokens, report.skipped_norm = skipped
        with gradients_aside(self._tensors) as drop:
            while True:
                with Attempt() as attempt, passes.checkpointing(self.model, plan.checkpointing):
                    passes.embed_with_cache(self.model, record, cache_UE)
                if attempt.failed is None:
                    break
                drop()
                record.graphs.clear()
                record.boundaries.clear()
                report.replans += 1
                plan = replace(plan, kept=0, boundaries=0)
                texts = PackedBatch.concat(record.chunks)
                if record.states is not None:  # the masks belong to the chunks, which therefore stay as they are
                    plan = replace(plan, tokens_per_chunk=int(texts.lengths.max()))
                plan = self._planner.smaller(plan, texts, attempt.failed)
                if record.states is None:
                    everything = np.arange(texts.num_sequences)
                    record, cache_UE = passes.cut_again(record, cache_UE, everything, plan.tokens_per_chunk)


def _check_batch(name: str, value: Any) -> None:
    if not isinstance(value, PackedBatch):
        raise TypeError(f"[GradCache] {name} must be a PackedBatch, got {type(value).__name__}")


def _tensors(parameters: Any) -> list[torch.Tensor]:
    given = list(parameters) if isinstance(parameters, Iterable) else [parameters]
    for parameter in given:
        if not isinstance(parameter, torch.Tensor):
            raise TypeError(f"[GradCache] parameters must be tensors, got {type(parameter).__name__}")
    return given


def _joined(queries: PackedBatch, documents: PackedBatch) -> PackedBatch:
    for name, batch in (("queries", queries), ("documents", documents)):
        _check_batch(name, batch)
    if not queries.num_sequences or not documents.num_sequences:
        raise ValueError(
            f"[GradCache] expected queries and documents, got {queries.num_sequences} and {documents.num_sequences}"
        )
    return PackedBatch.concat((queries, documents))


def _fill(chunks: Sequence[PackedBatch], plan: Plan) -> float:
    """Mean share of the token budget in all chunks but the last."""
    shares = [min(chunk.num_tokens / plan.tokens_per_chunk, 1.0) for chunk in chunks[:-1]]
    return sum(shares) / len(shares) if shares else 1.0
