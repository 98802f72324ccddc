"""GradCache: gradients of a large batch with the memory of one chunk, or with all available memory.

Source: Gao et al., arXiv 2101.06983; docs/dev/grad_cache.md describes the schedule, the planner and their cost. Legend:
B queries, M documents, S sequences of a stream, U distinct ones, E dimension.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from pyqemb.data.batch import PackedBatch, to_device
from pyqemb.ops import checks
from pyqemb.training.grad_cache import passes
from pyqemb.training.grad_cache.chunks import chunk, chunk_tokens, distinct
from pyqemb.training.grad_cache.memory import PeakMemory, gradients_aside
from pyqemb.training.grad_cache.passes import Model, PassRecord, RngState
from pyqemb.training.grad_cache.plan import Plan
from pyqemb.training.grad_cache.planner import StepPlanner
from pyqemb.training.grad_cache.ranks import StepRanks
from pyqemb.training.grad_cache.skip import skip_small_gradients

LossFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LossOf = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class StepReport:
    """Statistics of a step. Bytes are the increase over the start of the step, None if not predicted or measured."""

    plan: Plan
    sequences: int
    distinct: int  # distinct sequences, which are encoded
    tokens: int  # tokens of the distinct sequences
    chunks: int
    fill: float  # mean share of tokens_per_chunk in all chunks except the last
    kept: int = 0  # chunks that kept their graph
    predicted_bytes: int | None = None
    measured_bytes: int | None = None
    replans: int = 0
    skipped_texts: float = 0.0  # share of the distinct texts without a second pass
    skipped_tokens: float = 0.0  # share of their tokens
    skipped_norm: float = 0.0  # share of the summed norm of the cached gradients


@dataclass
class ForwardRecord:
    """The result of `GradCache.forward`: the embeddings for the loss, and the input of `GradCache.backward`."""

    embeddings: torch.Tensor  # [S, E], of the texts of the stream in order, detached
    report: StepReport
    encoded: PassRecord  # the first pass over the distinct texts
    row_S: torch.Tensor  # int64, the row of `encoded.vectors_UE` of each text of the stream
    peak: PeakMemory | None = None  # running; None: memory is not measured


class GradCache:
    """Train on batches of any size with bounded memory.

    Up to rounding, the gradients equal those of the same loss without caching, for any chunks and any plan. Equal token
    sequences are encoded once, unless the model uses random numbers. A step that runs out of memory is repeated with
    smaller chunks.

    A step has three phases, which `step` runs for a loss of queries and documents. Call them yourself if the loss needs
    more, such as a reduction over ranks (see the example).

    Args:
        model: PackedBatch [B] -> vectors [B, E]. If its forward pass takes `boundaries`, as that of the Embedder does,
            recomputation can be saved.
        loss_fn: (queries_BE, documents_ME) -> scalar, differentiable; may have its own parameters. Required by `step`
            and by calls, not by the phases and `step_stream`.
        tokens_per_chunk: the tokens of one forward pass, or with `memory` their maximum; a longer sequence gets its own
            pass.
        plan: a fixed plan of the memory.
        memory: the bytes that a step may take over its start, or "auto": nine tenths of the free memory. The planner
            then chooses chunks, kept graphs, boundary tensors and checkpointing. None: no graphs are kept.
        skip: the share of the summed norm of the cached gradients that may be skipped: the texts with the smallest
            gradients have no second pass. Not exact; 0 skips nothing.
        parameters: the tensors whose .grad receives the gradients (default: the parameters of the model).
        ranks: the ranks that the weights are sharded over (`pyqemb.training.parallel.sharding`); all of them run every
            step. Gradients are then this rank's shards of the sums over these ranks.

    Raises:
        ValueError: tokens_per_chunk below 1; skip outside 0..1 or with a model that uses random numbers; both `plan`
            and `memory`.

    `last` is the StepReport of the last step. The logger "pyqemb" gets a message when the plan changes, or when a step
    runs out of memory.

    Example:
        >>> from pyqemb.testing.tiny import tiny_embedder
        >>> model = tiny_embedder()
        >>> texts = ["one question", "another one", "its answer", "another answer"]
        >>> batch = pyqemb.PackedBatch.pack(model.tokenizer.encode_documents(texts))
        >>> loss_fn = lambda queries_BE, documents_BE: (1 - (queries_BE * documents_BE).sum(1)).mean()
        >>> cache = pyqemb.GradCache(model, loss_fn, tokens_per_chunk=16)
        >>> loss = cache.step(batch.select([0, 1]), batch.select([2, 3]))  # adds to the .grad of the parameters

        The same in three phases:

        >>> record = cache.forward(batch)
        >>> embeddings_SE = record.embeddings.requires_grad_()
        >>> loss = loss_fn(embeddings_SE[:2], embeddings_SE[2:])
        >>> cache.backward(record, torch.autograd.grad(loss, embeddings_SE)[0])
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
        ranks: StepRanks | None = None,
    ):
        for name, value in (("model", model), ("loss_fn", loss_fn)):
            if not callable(value) and (value is not None or name == "model"):
                raise TypeError(f"[GradCache] {name} must be callable, got {type(value).__name__}")
        checks.integer("GradCache", "tokens_per_chunk", tokens_per_chunk, 1)
        if plan is not None and not isinstance(plan, Plan):
            raise TypeError(f"[GradCache] plan must be a Plan, got {type(plan).__name__}")
        if ranks is not None and not isinstance(ranks, StepRanks):
            raise TypeError(f"[GradCache] ranks must be StepRanks, got {type(ranks).__name__}")
        if not 0 <= checks.number("GradCache", "skip", skip) < 1:
            raise ValueError(f"[GradCache] skip must lie in 0..1, got {skip}")
        if memory is not None and plan is not None:
            raise ValueError("memory and plan exclude each other: one is chosen from the other")
        automatic = memory is None or (isinstance(memory, str) and memory == "auto")
        if not automatic and (isinstance(memory, bool) or not isinstance(memory, int) or memory <= 0):
            raise ValueError(f"[GradCache] memory must be a number of bytes, 'auto' or None, got {memory!r:.100}")
        self.model, self.loss_fn, self.memory, self.skip = model, loss_fn, memory, skip
        self.last: StepReport | None = None
        own: list[torch.Tensor] = list(model.parameters()) if isinstance(model, nn.Module) else []
        gradients = [p for p in own if p.requires_grad] if parameters is None else _tensors(parameters)
        self._tensors = list({id(x): x for x in (*gradients, *own)}.values())  # their .grad changes in a backward pass
        self.ranks = ranks or StepRanks()
        self._planner = StepPlanner(
            model,
            plan or Plan(tokens_per_chunk),
            memory,
            gradients,
            self._tensors,
            may_save=not skip,
            ranks=self.ranks,
        )

    def step(self, queries: PackedBatch, documents: PackedBatch, scale: float = 1.0) -> torch.Tensor:
        """Add `scale` times the gradients of the loss over the whole batch to the .grad of the parameters.

        Args:
            queries: the queries of the batch.
            documents: its documents.
            scale: a factor of the gradients (default 1).

        Returns:
            The loss, a scalar, detached and not scaled. A loss that is not finite adds no gradient.

        Raises:
            ValueError: no queries or no documents.
        """
        joined = _joined(queries, documents)
        return self.step_stream(joined, self._pair_loss(queries), scale)

    def step_stream(self, stream: PackedBatch, loss_of: LossOf, scale: float = 1.0) -> torch.Tensor:
        """Run `step` for one stream of texts.

        Args:
            stream: S texts, possibly none.
            loss_of: vectors [S, E] -> scalar, differentiable.
            scale: a factor of the gradients (default 1).

        Returns:
            The loss, a scalar, detached and not scaled.

        Raises:
            TypeError: `loss_of` is not callable.
        """
        if not callable(loss_of):
            raise TypeError(f"[GradCache] loss_of must be callable, got {type(loss_of).__name__}")
        scale = checks.finite("GradCache", "scale", scale)
        record = self.forward(stream)
        loss, gradient_SE = passes.loss_and_cache(loss_of, record.embeddings, scale)
        self.backward(record, gradient_SE) if gradient_SE is not None else self.discard(record)
        return loss

    def __call__(self, queries: PackedBatch, documents: PackedBatch) -> torch.Tensor:
        """The loss; its backward runs the second pass.

        The result can be scaled and added to other losses, and several calls can precede one backward pass. Memory is
        planned, but its peak is not measured.
        """
        joined, loss_of = _joined(queries, documents), self._pair_loss(queries)
        record = self._forward(joined)
        self.last = record.report
        embeddings_SE = record.embeddings.requires_grad_()
        embeddings_SE.register_hook(lambda gradient_SE: self._backward(record, gradient_SE))
        return loss_of(embeddings_SE)

    def forward(self, stream: PackedBatch) -> ForwardRecord:
        """First phase: embed every text of the stream. End the step with `backward` or `discard`.

        Args:
            stream: S texts, possibly none.

        Returns:
            The embeddings [S, E], detached, and the input of the last phase.
        """
        _check_batch("stream", stream)
        peak = None
        if self.memory is not None:
            peak = PeakMemory(passes.device_of(self.model, [stream]))
            peak.start()
        record = self._forward(stream)
        record.peak = peak
        return record

    def backward(self, record: ForwardRecord, gradient_SE: torch.Tensor) -> None:
        """Last phase: add gradients to the .grad of the parameters.

        Args:
            record: the result of `forward`.
            gradient_SE: [S, E], the gradient of the loss at `record.embeddings`.

        Raises:
            TypeError: not a ForwardRecord and a tensor.
            ValueError: the gradient has another shape than the embeddings.
        """
        _check_record(record)
        if not isinstance(gradient_SE, torch.Tensor):
            raise TypeError(f"[GradCache] gradient must be a torch.Tensor, got {type(gradient_SE).__name__}")
        if gradient_SE.shape != record.embeddings.shape:
            raise ValueError(
                f"[GradCache] gradient must have the shape of the embeddings, {list(record.embeddings.shape)}, "
                f"got {list(gradient_SE.shape)}"
            )
        for name in ("dtype", "device"):
            wanted, got = getattr(record.embeddings, name), getattr(gradient_SE, name)
            if wanted != got:
                raise TypeError(f"[GradCache] gradient must have the {name} of the embeddings, {wanted}, got {got}")
        self._backward(record, gradient_SE)
        self._finish(record)

    def discard(self, record: ForwardRecord) -> None:
        """End a step without gradients, for example because the loss is not finite, and free its memory.

        Args:
            record: the result of `forward`.
        """
        _check_record(record)
        record.encoded.graphs.clear()
        record.encoded.boundaries.clear()
        self.ranks.end()
        self._finish(record)

    def planned(self, stream: PackedBatch) -> Plan:
        """Plan a step; the first call runs a probe.

        Args:
            stream: distinct texts.

        Returns:
            The plan, with its predicted peak memory.
        """
        _check_batch("stream", stream)
        return self._planner.predicted(self._planner.plan(stream), stream)

    def preview(self, stream: PackedBatch) -> str:
        """Describe the plan of a step.

        Args:
            stream: distinct texts.

        Returns:
            A line.
        """
        plan = self.planned(stream)
        return plan.line(len(chunk_tokens(stream.lengths, plan.tokens_per_chunk)))

    def _pair_loss(self, queries: PackedBatch) -> LossOf:
        loss_fn, count = self.loss_fn, queries.num_sequences
        if loss_fn is None:
            raise ValueError("[GradCache] expected a loss_fn: without one only step_stream works")
        return lambda vectors_SE: loss_fn(vectors_SE[:count], vectors_SE[count:])

    def _forward(self, stream: PackedBatch) -> ForwardRecord:
        stochastic = passes.is_stochastic(self.model)
        if stochastic and self.skip:
            raise ValueError(
                "skip needs a model that draws no random numbers: its texts are packed again for the second pass"
            )
        # Two copies of a text must get two dropout masks.
        first_U, same_S = (np.arange(stream.num_sequences),) * 2 if stochastic else distinct(stream)
        texts = stream if len(first_U) == len(same_S) else stream.select(torch.from_numpy(first_U))
        encoded, order_U, plan, replans = self._first_pass(texts, stochastic)
        row_U = np.empty_like(order_U)
        row_U[order_U] = np.arange(len(order_U))
        row_S = to_device(torch.from_numpy(row_U[same_S]), encoded.vectors_UE.device)
        chunks = encoded.chunks
        report = StepReport(
            plan, stream.num_sequences, len(first_U), texts.num_tokens, len(chunks), _fill(chunks, plan),
            len(encoded.graphs), plan.peak_bytes, replans=replans,
        )  # fmt: skip
        return ForwardRecord(encoded.vectors_UE.index_select(0, row_S), report, encoded, row_S)

    def _first_pass(self, texts: PackedBatch, stochastic: bool) -> tuple[PassRecord, np.ndarray, Plan, int]:
        """Run embed_without_graph, and repeat it with smaller plans while it runs out of memory.

        Returns the record, the text of each of its rows, the plan that fit, and the number of plans that did not.
        """
        device, planner = passes.device_of(self.model, [texts]), self._planner
        random = RngState.now(device) if stochastic else None
        plan, replans = planner.plan(texts), 0
        while True:
            plan = self.ranks.agree(plan)
            chunks, order_U = chunk(texts, plan.tokens_per_chunk)
            chunks = [texts.select([])] * self.ranks.missing(len(chunks)) + chunks
            planner.announce(plan, len(chunks))
            kept = plan.kept
            if len(chunks) == 1 and not plan.reshard:
                kept = 1  # a single graph takes no more memory than a second pass
            self.ranks.begin(plan)
            with self.ranks.attempt(len(chunks), backward=False) as caught:
                record = passes.embed_without_graph(
                    self.model, chunks, kept, plan.boundaries, planner.guard(texts), self.ranks.one_pass
                )
            if caught.error is None:
                return record, order_U, plan, replans
            plan, replans = planner.smaller(plan, texts, caught.error), replans + 1
            if random is not None:
                random.restore(device)

    def _backward(self, forward: ForwardRecord, gradient_SE: torch.Tensor) -> None:
        """Run embed_with_cache, and repeat it with smaller plans while it runs out of memory.

        Each attempt starts from the original gradients.
        """
        record, report = forward.encoded, forward.report
        plan = report.plan
        cache_UE = torch.zeros_like(record.vectors_UE).index_add_(0, forward.row_S, gradient_SE)
        if self.skip:
            record, cache_UE, skipped = skip_small_gradients(record, cache_UE, self.skip, plan.tokens_per_chunk)
            report.skipped_texts, report.skipped_tokens, report.skipped_norm = skipped
        with gradients_aside(self._tensors) as drop:
            while True:
                record.chunks += [record.chunks[0].select([])] * self.ranks.missing(len(record.chunks))
                attempt = self.ranks.attempt(len(record.chunks), backward=True)
                with attempt as caught, passes.checkpointing(self.model, plan.checkpointing):
                    passes.embed_with_cache(self.model, record, cache_UE, self.ranks.one_pass)
                if caught.error is None:
                    break
                drop()
                record.graphs.clear()
                record.boundaries.clear()
                report.replans += 1
                plan, texts = replace(plan, kept=0, boundaries=0), PackedBatch.concat(record.chunks)
                if record.states is not None:  # dropout masks belong to the chunks, so these must not change
                    plan = replace(plan, tokens_per_chunk=self.ranks.most(int(texts.lengths.max())))
                plan = self.ranks.agree(self._planner.smaller(plan, texts, caught.error))
                if record.states is None:
                    everything = np.arange(texts.num_sequences)
                    record, cache_UE = passes.rechunk(record, cache_UE, everything, plan.tokens_per_chunk)
                self.ranks.begin(plan)
        self.ranks.end()

    def _finish(self, record: ForwardRecord) -> None:
        """Store the report at the end of a step."""
        if record.peak is not None:
            record.peak.stop()
            record.report.measured_bytes = record.peak.peak_bytes
            self._planner.compare(record.report.predicted_bytes, record.peak.peak_bytes)
        self.last = record.report


def _check_batch(name: str, value: Any) -> None:
    if not isinstance(value, PackedBatch):
        raise TypeError(f"[GradCache] {name} must be a PackedBatch, got {type(value).__name__}")


def _check_record(record: Any) -> None:
    if not isinstance(record, ForwardRecord):
        raise TypeError(f"[GradCache] record must be a ForwardRecord, got {type(record).__name__}")


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
    """Mean share of the token budget in all chunks except the last."""
    filled = [chunk for chunk in chunks if chunk.num_tokens]
    shares = [min(chunk.num_tokens / plan.tokens_per_chunk, 1.0) for chunk in filled[:-1]]
    return sum(shares) / len(shares) if shares else 1.0
