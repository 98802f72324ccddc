"""Gradient caching: the gradients of one big batch in the memory of one chunk, or in as much memory as there is.

Source: Gao et al., arXiv 2101.06983; the schedule, the planner and what they cost are in docs/grad_cache.md.
Legend: B queries, M documents, S sequences of a stream, U distinct ones, E dimension.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from pyqemb.data.batch import PackedBatch, to_device
from pyqemb.training import passes
from pyqemb.training.chunks import cut, distinct, pack
from pyqemb.training.memory import Meter, free_bytes, give_back, is_allocation_failure, used_bytes
from pyqemb.training.passes import Model, Record, RngState
from pyqemb.training.passes import embed_with_cache as embed_with_cache
from pyqemb.training.passes import embed_without_graph as embed_without_graph
from pyqemb.training.passes import loss_and_cache as loss_and_cache
from pyqemb.training.planner import Plan as Plan
from pyqemb.training.planner import Sizes, choose, predict
from pyqemb.training.probe import TokenCosts, measure

LossFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LossOf = Callable[[torch.Tensor], torch.Tensor]
_LARGE_CHUNK, _LARGE_CHUNK_ON_A_GPU = 4096, 16384  # tokens; larger ones are not faster
_MARGIN = 0.9  # of what is free: the budget of "auto"


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
        tokens_per_chunk: tokens of one pass; a longer sequence has one of its own. With `memory` the planner chooses.
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
        if tokens_per_chunk < 1:
            raise ValueError(f"tokens_per_chunk must be at least 1, got {tokens_per_chunk}")
        if not 0 <= skip < 1:
            raise ValueError(f"skip must lie in 0..1, got {skip}")
        if memory is not None and plan is not None:
            raise ValueError("memory and plan exclude each other: one is chosen from the other")
        if memory not in (None, "auto") and not (isinstance(memory, int) and memory > 0):
            raise ValueError(f"memory must be a number of bytes, 'auto' or None, got {memory!r}")
        self.model, self.loss_fn, self.memory, self.skip = model, loss_fn, memory, skip
        self.agree = agree or (lambda loss: loss)
        self.say = say or (lambda line: None)
        self.last: StepReport | None = None
        self._plan = plan or Plan(tokens_per_chunk)
        self._parameters = list(parameters) if parameters is not None else None
        self._costs: dict[bool, TokenCosts] = {}  # by checkpointing
        self._budget, self._overhead = 0, 0  # bytes; what steps took beyond the prediction and the budget
        self._limit: Plan | None = None  # the plan that came after an allocation had failed
        self._said: Any = None

    def step(self, queries: PackedBatch, documents: PackedBatch, scale: float = 1.0) -> torch.Tensor:
        """Add `scale` times the gradients of the loss over the whole batch to the .grad of the parameters.

        Returns the loss, detached and not scaled. A loss that is not finite adds no gradient.

        Raises:
            ValueError: no queries or no documents.
        """
        return self.step_stream(_joined(queries, documents), self._pair_loss(queries), scale)

    def step_stream(self, stream: PackedBatch, loss_of: LossOf, scale: float = 1.0) -> torch.Tensor:
        """`step` for one stream of texts: `loss_of` takes their vectors [S, E]. The stream may be empty."""
        meter = Meter(passes.device_of(self.model, [stream]))
        with meter if self.memory is not None else nullcontext():
            record, place_S, report = self._first_pass(stream)
            loss, cache_UE = loss_and_cache(
                lambda vectors_UE: loss_of(vectors_UE.index_select(0, place_S)), record.vectors_UE, scale, self.agree
            )
            if cache_UE is not None:
                self._second_pass(record, report, cache_UE)
        if self.memory is not None:
            self._compare(report, meter.peak_bytes)
        self.last = report
        return loss

    def __call__(self, queries: PackedBatch, documents: PackedBatch) -> torch.Tensor:
        """The loss; its backward runs the second pass.

        So it can be scaled, added to other losses, and several can go before one backward. `agree` has no part in it; memory is
        planned but its peak is not measured.
        """
        record, place_S, report = self._first_pass(_joined(queries, documents))
        self.last = report
        leaves_UE = record.vectors_UE.detach().requires_grad_()
        leaves_UE.register_hook(lambda cache_UE: self._second_pass(record, report, cache_UE))
        return self._pair_loss(queries)(leaves_UE.index_select(0, place_S))

    def planned(self, stream: PackedBatch) -> Plan:
        """What a step over this stream would do, with its predicted peak; costs a probe of a few tokens the first time."""
        device = passes.device_of(self.model, [stream])
        plan = self._planned(stream, device)
        if plan.peak_bytes is None:
            tokens = _tokens(stream.lengths, plan.tokens_per_chunk)
            plan = replace(plan, peak_bytes=predict(plan, tokens, *self._sizes(stream, device, plan.checkpointing)))
        return plan

    def _pair_loss(self, queries: PackedBatch) -> LossOf:
        loss_fn, count = self.loss_fn, queries.num_sequences
        if loss_fn is None:
            raise ValueError("[GradCache] expected a loss_fn: without one only step_stream works")
        return lambda vectors_SE: loss_fn(vectors_SE[:count], vectors_SE[count:])

    def _first_pass(self, stream: PackedBatch) -> tuple[Record, torch.Tensor, StepReport]:
        """The record, where in its vectors each sequence of the stream finds its own, and the report so far."""
        draws = passes.draws(self.model)
        if draws and self.skip:
            raise ValueError(
                "skip needs a model that draws no random numbers: its texts are packed anew for the second pass"
            )
        # Two copies of a text must see two dropout masks.
        first_U, same_S = (np.arange(stream.num_sequences),) * 2 if draws else distinct(stream)
        texts = stream if len(first_U) == len(same_S) else stream.select(torch.from_numpy(first_U))
        device = passes.device_of(self.model, [stream])
        random = RngState.now(device) if draws else None
        plan, replans = self._planned(texts, device), 0
        while True:
            chunks, order_U = cut(texts, plan.tokens_per_chunk)
            self._announce(plan, len(chunks))
            kept = (
                1 if len(chunks) == 1 else plan.kept
            )  # the graph of a single chunk takes no more than a second pass would
            with _Attempt() as attempt:
                record = passes.embed_without_graph(self.model, chunks, kept, plan.boundaries, self._guard(device))
            if attempt.failed is None:
                break
            plan, replans = self._smaller(plan, texts, attempt.failed, device), replans + 1
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
        device, plan = record.vectors_UE.device, report.plan
        if self.skip:
            record, cache_UE = _without_the_least(record, report, cache_UE, self.skip)
        with self._gradients_aside() as drop:
            while True:
                with _Attempt() as attempt, passes.checkpointing(self.model, plan.checkpointing):
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
                plan = self._smaller(plan, texts, attempt.failed, device)
                if record.states is None:
                    everything = np.arange(texts.num_sequences)
                    record, cache_UE = passes.cut_again(record, cache_UE, everything, plan.tokens_per_chunk)

    def _planned(self, texts: PackedBatch, device: torch.device) -> Plan:
        if self.memory is None:
            return self._plan.within(self._limit)
        self._budget = self.memory if isinstance(self.memory, int) else int(_MARGIN * free_bytes(device))
        costs, sizes = self._sizes(texts, device)
        lengths = texts.lengths
        return choose(
            self._budget,
            _LARGE_CHUNK if device.type == "cpu" else _LARGE_CHUNK_ON_A_GPU,
            int(lengths.max(initial=1)),
            lambda budget: _tokens(lengths, budget),
            costs,
            sizes,
            (lambda: self._measured(texts, device, True)) if passes.checkpointed_parts(self.model) else None,
            may_save=not self.skip,
        )

    def _sizes(self, texts: PackedBatch, device: torch.device, checkpointed: bool = False) -> tuple[TokenCosts, Sizes]:
        """What predictions stand on."""
        costs = self._measured(texts, device, checkpointed)
        gradients = [x.numel() * x.element_size() for x in self._holders()]
        vectors = texts.num_sequences * costs.vector
        return costs, Sizes(vectors, sum(gradients), max(gradients, default=0), self._overhead)

    def _measured(self, texts: PackedBatch, device: torch.device, checkpointed: bool) -> TokenCosts:
        """The costs of a token, measured once."""
        if checkpointed not in self._costs:
            random = RngState.now(device)
            with self._gradients_aside() as drop:
                self._costs[checkpointed] = measure(self.model, texts, self._holders(), checkpointed)
                drop()
            random.restore(device)
        return self._costs[checkpointed]

    def _guard(self, device: torch.device) -> Callable[[PackedBatch], bool]:
        """Whether a chunk may still keep its graph, by what is really in use when it comes."""
        if self.memory is None:
            return lambda chunk: True
        start, costs = used_bytes(device), self._costs[False]

        def may_keep(chunk: PackedBatch) -> bool:
            needed = (costs.graph + costs.forward) * chunk.num_tokens
            return used_bytes(device) - start + needed <= self._budget

        return may_keep

    def _smaller(self, plan: Plan, texts: PackedBatch, failed: BaseException, device: torch.device) -> Plan:
        """The next plan after one that did not fit; raises what failed where there is none."""
        gc.collect()
        give_back(device)
        plan = replace(plan, tokens_per_chunk=min(plan.tokens_per_chunk, texts.num_tokens))
        smaller = plan.smaller(int(texts.lengths.max(initial=1)), bool(passes.checkpointed_parts(self.model)))
        if smaller is None:
            raise failed
        if self.memory is None:
            self._limit = smaller
        else:
            self._overhead += self._budget // 10
        self.say(f"gradient cache: out of memory ({str(failed).splitlines()[0]}); trying again with {smaller}")
        return smaller

    def _announce(self, plan: Plan, chunks: int) -> None:
        """Say the plan the first time, and when it has changed by more than the batches differ."""
        kept = round(10 * min(plan.kept, chunks) / max(chunks, 1))
        what = (plan.tokens_per_chunk, kept, plan.boundaries > 0, plan.checkpointing)
        if self.memory is not None and what != self._said:
            self._said = what
            self.say(plan.line(chunks))
            if plan.peak_bytes is not None and plan.peak_bytes > self._budget:
                self.say(f"gradient cache: nothing fits into {_mib(self._budget)}; trying the smallest plan")

    def _compare(self, report: StepReport, measured: int) -> None:
        """Note the measured peak; plan with the difference from now on where the budget was passed."""
        report.measured_bytes = measured
        if measured > self._budget and report.predicted_bytes is not None:
            self._overhead += max(measured - report.predicted_bytes, 0)
            self.say(
                f"gradient cache: the step took {_mib(measured)}, more than its {_mib(self._budget)}; "
                f"predictions are raised by {_mib(self._overhead)}"
            )

    def _holders(self) -> list[torch.Tensor]:
        """The tensors whose .grad the gradients end up in."""
        if self._parameters is not None:
            return self._parameters
        return [p for p in self.model.parameters() if p.requires_grad] if isinstance(self.model, nn.Module) else []

    @contextmanager
    def _gradients_aside(self) -> Iterator[Callable[[], None]]:
        """Gradients made inside are added at the end to those from before. What it yields drops the new ones."""
        own = self.model.parameters() if isinstance(self.model, nn.Module) else ()
        tensors = list({id(x): x for x in (*self._holders(), *own)}.values())
        before = [x.grad for x in tensors]

        def drop() -> None:
            for x in tensors:
                x.grad = None

        drop()
        try:
            yield drop
        except BaseException:
            drop()
            raise
        finally:
            with torch.no_grad():
                for x, old in zip(tensors, before, strict=True):
                    if old is not None:
                        x.grad = old if x.grad is None else old.add_(x.grad)


class _Attempt:
    """`with _Attempt() as attempt`: an allocation failure ends the block quietly and is `attempt.failed`."""

    failed: BaseException | None = None

    def __enter__(self) -> "_Attempt":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if error is None or not is_allocation_failure(error):
            return False
        self.failed = error.with_traceback(None)  # its frames hold the memory that is wanted
        return True


def _without_the_least(
    record: Record, report: StepReport, cache_UE: torch.Tensor, share: float
) -> tuple[Record, torch.Tensor]:
    """The record without the texts whose cached gradients are smallest: together at most `share` of the summed norm.

    Texts of chunks that kept their graph stay.
    """
    norms = torch.linalg.vector_norm(cache_UE.double(), dim=1).cpu().numpy()
    lengths = np.concatenate([chunk.lengths for chunk in record.chunks])
    kept = np.concatenate([record.rows(number) for number in record.graphs]) if record.graphs else np.empty(0, np.int64)
    others = np.setdiff1d(np.arange(len(norms)), kept)
    ascending = others[np.argsort(norms[others], kind="stable")]
    count = np.searchsorted(np.cumsum(norms[ascending]), share * norms.sum(), side="right")
    dropped = ascending[:count]
    report.skipped_texts = len(dropped) / max(len(norms), 1)
    report.skipped_tokens = float(lengths[dropped].sum() / max(lengths.sum(), 1))
    report.skipped_norm = float(norms[dropped].sum() / norms.sum()) if len(dropped) and norms.sum() else 0.0
    if not count:
        return record, cache_UE
    return passes.cut_again(record, cache_UE, np.setdiff1d(others, dropped), report.plan.tokens_per_chunk)


def _joined(queries: PackedBatch, documents: PackedBatch) -> PackedBatch:
    if not queries.num_sequences or not documents.num_sequences:
        raise ValueError(
            f"[GradCache] expected queries and documents, got {queries.num_sequences} and {documents.num_sequences}"
        )
    return PackedBatch.concat((queries, documents))


def _tokens(lengths: np.ndarray, budget: int) -> np.ndarray:
    """Of each chunk."""
    return np.array([lengths[part].sum() for part in pack(lengths, budget)])


def _fill(chunks: Sequence[PackedBatch], plan: Plan) -> float:
    """Mean share of the token budget in all chunks but the last."""
    shares = [min(chunk.num_tokens / plan.tokens_per_chunk, 1.0) for chunk in chunks[:-1]]
    return sum(shares) / len(shares) if shares else 1.0


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
