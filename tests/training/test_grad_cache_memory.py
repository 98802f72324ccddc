"""What a step does with its memory: packing, kept graphs, budgets, failed allocations, skipped texts."""

import logging
import time

import numpy as np
import pytest
import torch

from pyqemb.data.batch import PackedBatch
from pyqemb.testing.cached_step import Dropping, assert_close, backward, batches, gradients, loss_fn, uncached
from pyqemb.testing.cases import heavy_tailed
from pyqemb.testing.tiny import tiny_embedder
from pyqemb.training.grad_cache import GradCache, Plan, passes, planner
from pyqemb.training.grad_cache.chunks import distinct, pack
from pyqemb.training.grad_cache.memory import PeakMemory, free_bytes, give_back

ALL = 10**6


@pytest.fixture
def said(caplog):
    """Messages of the logger."""
    caplog.set_level(logging.INFO, "pyqemb")
    return caplog


def mix(pairs):
    return np.array(heavy_tailed(pairs, median=16) + heavy_tailed(pairs, median=100, seed=1))


@pytest.mark.parametrize("budget", [1024, 4096, 16384])
@pytest.mark.parametrize("pairs", [256, 2000])
def test_chunks_are_full(pairs, budget):
    lengths = mix(pairs)
    parts = pack(lengths, budget)
    tokens = np.array([lengths[part].sum() for part in parts])
    assert len(parts) > 1
    assert tokens.max() <= budget
    assert tokens[:-1].min() >= 0.98 * budget
    assert sorted(np.concatenate(parts).tolist()) == list(range(2 * pairs))


def test_packing_is_best_fit_decreasing():
    parts = pack(np.array([3, 50, 7, 6, 2, 9, 4]), 10)
    assert [part.tolist() for part in parts] == [[1], [5], [2, 0], [3, 6], [4]]
    assert [part.tolist() for part in pack(np.array([7, 6, 3, 5]), 10)] == [[0, 2], [1], [3]]
    assert [part.tolist() for part in pack(np.array([3, 7]), 10)] == [[0, 1]]
    assert [part.tolist() for part in pack(np.array([], dtype=np.int64), 10)] == [[]]


def test_packing_is_fast():
    lengths = mix(50_000)
    ids = torch.randint(0, 8000, (int(lengths.sum()),))
    stream = PackedBatch._from_lengths(ids, lengths)
    start = time.process_time()
    pack(lengths, 4096), distinct(stream)
    assert time.process_time() - start < 10  # a fraction of a second; quadratic: minutes


def test_distinct_sequences():
    stream = PackedBatch.pack([[1, 2], [], [3], [1, 2], [1], [2], [], [3]])
    first, same = distinct(stream)
    assert first.tolist() == [0, 1, 2, 4, 5]
    assert same.tolist() == [0, 1, 2, 0, 3, 4, 1, 2]


def test_a_kept_chunk_is_not_embedded_again():
    model, runs = tiny_embedder(), []
    model.register_forward_hook(lambda module, inputs, output: runs.append((inputs[0].num_sequences, output.grad_fn)))
    cache = GradCache(model, loss_fn, plan=Plan(60, kept=2))
    cache.step(*batches())
    chunks = cache.last.chunks
    assert chunks > 3
    assert len(runs) == 2 * chunks - 2
    assert [graph is not None for _, graph in runs] == [False] * (chunks - 2) + [True] * chunks


def test_a_single_chunk_is_embedded_once():
    model, runs = tiny_embedder(), []
    model.register_forward_hook(lambda *_: runs.append(1))
    GradCache(model, loss_fn, ALL).step(*batches())
    assert len(runs) == 1


def test_boundary_tensors_spare_products(monkeypatch):
    counts = []
    for plan in (Plan(60), Plan(60, boundaries=2), Plan(60, boundaries=ALL)):
        model, products = tiny_embedder(), []
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.register_forward_hook(lambda *_: products.append(1))  # noqa: B023
        cache = GradCache(model, loss_fn, plan=plan)
        cache.step(*batches())
        counts.append(len(products) / 4)
    assert counts == [2 * cache.last.chunks, 2 * cache.last.chunks - 2, cache.last.chunks]


class Scarce:
    """Fails as an allocator does: when a chunk has more than so many tokens, or the first `times` times."""

    def __init__(self, embedder, tokens=ALL, times=0, when=lambda: True, error=None):
        self.tokens, self.times, self.when = tokens, times, when
        self.error = error or RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")
        embedder.model.layers[1].register_forward_pre_hook(self)
        self.failures = 0

    def __call__(self, module, inputs):
        if self.when() and (len(inputs[0]) > self.tokens or self.failures < self.times):
            self.failures += 1
            raise self.error


ERRORS = [None, MemoryError("bad_alloc"), torch.OutOfMemoryError("CUDA out of memory")]


FAILURES = [  # the plan, and the pass through the model that fails: of five chunks, or one
    (Plan(60), 2),
    (Plan(60), 7),
    (Plan(60, kept=2, boundaries=ALL), 2),
    (Plan(60, kept=2, boundaries=ALL), 5),
    (Plan(60, kept=2, boundaries=ALL), 7),
    (Plan(ALL), 1),
]


@pytest.mark.parametrize("error", ERRORS, ids=str)
@pytest.mark.parametrize(("plan", "failing"), FAILURES, ids=str)
@pytest.mark.parametrize(
    "before",
    [
        pytest.param(False, id="no gradients before", marks=pytest.mark.deep),
        pytest.param(True, id="gradients before"),
    ],
)
def test_a_failed_allocation_changes_nothing(plan, failing, error, before, said):
    model, (queries, documents) = tiny_embedder().double(), batches()
    _, truth = gradients(model, uncached(model, queries, documents))
    cache = GradCache(model, loss_fn, plan=plan)
    calls = []
    scarce = Scarce(model, times=1, when=lambda: calls.append(1) or len(calls) == failing, error=error)

    def step():
        if before:
            for p in model.parameters():
                p.grad = torch.ones_like(p)
        return cache.step(queries, documents)

    _, grads = gradients(model, step)
    assert scarce.failures == 1
    assert cache.last.replans == 1
    assert "out of memory" in said.messages[0]
    assert_close({name: g - 1 if before else g for name, g in grads.items()}, truth, 1e-9 if before else 1e-12)


def test_a_smaller_plan_is_remembered():
    model = tiny_embedder()
    scarce = Scarce(model, tokens=50)
    cache = GradCache(model, loss_fn, 100)
    cache.step(*batches())
    assert scarce.failures
    assert cache.last.replans
    failures = scarce.failures
    cache.step(*batches())
    assert scarce.failures == failures
    assert cache.last.replans == 0


@pytest.mark.parametrize("second", [False, True])
def test_only_a_smallest_chunk_that_does_not_fit_is_an_error(second, said):
    model = tiny_embedder()
    Scarce(model, tokens=0, when=lambda: torch.is_grad_enabled() == second)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        GradCache(model, loss_fn, plan=Plan(100, kept=2, boundaries=2)).step(*batches())
    longest = max(max(batch.lengths) for batch in batches())
    assert f"tokens_per_chunk={longest}, kept=0, boundaries=0, checkpointing=True" in said.messages[-1]
    assert all(p.grad is None for p in model.parameters())
    assert not model.model.checkpointing


def test_other_errors_pass_and_leave_the_gradients_as_they_were():
    model = tiny_embedder()
    GradCache(model, loss_fn, 60).step(*batches())
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    calls = []  # the first chunk has gone backward already
    Scarce(model, times=1, when=lambda: calls.append(1) or len(calls) == 7, error=RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        GradCache(model, loss_fn, 60).step(*batches())
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters())


def test_dropout_survives_a_failed_allocation():
    grads = []
    for kind in ("none", "first pass", "second pass"):
        model = Dropping(torch.float64).train()
        torch.manual_seed(4)
        cache = GradCache(model, loss_fn, plan=Plan(60, kept=1, boundaries=2))
        if kind == "second pass":
            Scarce(model.embedder, times=1, when=lambda m=model, c=cache: len(m.seen) > 6)
        if kind == "first pass":  # which is drawn again from where it began, here in the same chunks
            Scarce(model.embedder, times=1, when=lambda m=model: len(m.seen) == 4)
            cache = GradCache(model, loss_fn, plan=Plan(60, kept=1))
        grads.append(gradients(model, lambda c=cache: c.step(*batches()))[1])
        assert cache.last.replans == (kind != "none")
    for other in grads[1:]:
        assert_close(other, grads[0], 1e-12)


def test_gradients_kept_elsewhere_are_put_aside_too():
    """As with bfloat16 weights, whose gradients a hook moves to float32 ones."""
    model = tiny_embedder()
    masters = [p.detach().clone() for p in model.parameters()]

    def move(master):
        def hook(p):
            master.grad = p.grad.clone() if master.grad is None else master.grad.add_(p.grad)
            p.grad = None

        return hook

    _, truth = gradients(model, uncached(model, *batches()))
    model.zero_grad()
    for p, master in zip(model.parameters(), masters, strict=True):
        p.register_post_accumulate_grad_hook(move(master))
    calls = []
    scarce = Scarce(model, times=1, when=lambda: calls.append(1) or len(calls) > 6)
    GradCache(model, loss_fn, plan=Plan(60, kept=2), parameters=masters).step(*batches())
    assert scarce.failures == 1
    assert_close(dict(zip(truth, (master.grad for master in masters), strict=True)), truth, 1e-5)


@pytest.mark.parametrize("kept", [0, 2])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_skipping_drops_the_smallest_gradients(kept, share):
    model, (queries, documents) = tiny_embedder().double(), batches(20, 60)
    _, truth = gradients(model, uncached(model, queries, documents))
    cache = GradCache(model, loss_fn, plan=Plan(100, kept=kept), skip=share)
    again = []
    model.register_forward_hook(lambda m, inputs, output: again.append(inputs[0]) if output.requires_grad else None)
    _, grads = gradients(model, lambda: cache.step(queries, documents))
    last = cache.last
    assert 0.5 * share < last.skipped_norm <= share
    assert 0 < last.skipped_texts < 1
    assert last.skipped_tokens > 0.5 * share
    second = again[:-1] if kept == 0 else again[2:-1]
    assert all(batch.num_tokens > 90 for batch in second)  # packed anew
    assert sum(batch.num_sequences for batch in again) == 80 - round(last.skipped_texts * 80)
    difference = torch.cat([(grads[name] - truth[name]).flatten() for name in truth]).norm()
    size = torch.cat([gradient.flatten() for gradient in truth.values()]).norm()
    assert 0 < difference / size < 3 * share


def test_skipping_nothing_is_the_same_to_the_bit():
    results = []
    for skip in (0.0, 1e-12):
        model = tiny_embedder()
        cache = GradCache(model, loss_fn, plan=Plan(60, kept=1, boundaries=2), skip=skip)
        results.append(gradients(model, lambda c=cache: c.step(*batches()))[1])
        assert cache.last.skipped_texts == cache.last.skipped_norm == 0
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_what_is_skipped_leaves_no_boundary_tensors():
    def planned(budget, skip):
        cache = GradCache(tiny_embedder(), loss_fn, memory=budget, skip=skip)
        cache.step(*batches(40, 60))
        return cache.last.plan

    budgets = range(500_000, 1_500_000, 50_000)
    budget = next((budget for budget in budgets if planned(budget, 0.0).boundaries), None)
    assert budget is not None, "no budget made the planner use boundary tensors"
    assert planned(budget, 0.1).boundaries == 0


def test_skipping_is_not_for_dropout():
    with pytest.raises(ValueError, match="skip needs a model that draws no random numbers"):
        GradCache(Dropping().train(), loss_fn, skip=0.1).step(*batches())


@pytest.mark.parametrize("budget", [1, 500_000, 1_500_000, 4_000_000, 10**10, "auto"])
def test_a_budget_changes_no_gradient(budget, said):
    model, (queries, documents) = tiny_embedder().double(), batches(40, 60)
    _, truth = gradients(model, uncached(model, queries, documents))
    cache = GradCache(model, loss_fn, memory=budget)
    _, grads = gradients(model, lambda: cache.step(queries, documents))
    assert_close(grads, truth, 1e-12)
    assert said.messages[0].startswith("gradient cache: ")
    assert "predicted peak" in said.messages[0]
    assert cache.last.predicted_bytes > 0
    assert cache.last.measured_bytes is not None
    assert cache.last.plan.checkpointing == (budget in (1, 500_000))
    if budget in (10**10, "auto"):
        assert cache.last.kept == cache.last.chunks
    _, grads = gradients(model, lambda: backward(cache(queries, documents)))
    assert_close(grads, truth, 1e-12)


def test_the_plan_of_a_step_is_told_beforehand(said):
    stream = PackedBatch.concat(batches())
    cache = GradCache(tiny_embedder(), loss_fn, memory=1_500_000)
    plan = cache.planned(stream)
    assert plan == cache.planned(stream)
    assert plan.peak_bytes <= 1_500_000
    assert not said.messages
    cache.step(*batches())
    assert cache.last.plan == plan
    given = GradCache(tiny_embedder(), loss_fn, 60).planned(stream)
    assert (given.tokens_per_chunk, given.kept) == (60, 0)
    assert 100_000 < given.peak_bytes < plan.peak_bytes
    empty = cache.step_stream(PackedBatch.pack([]), lambda vectors: vectors.sum())
    assert empty == 0


def test_planning_leaves_gradients_and_random_numbers_alone():
    model = Dropping().train()
    first, *others = model.parameters()
    for p in others:
        p.grad = torch.ones_like(p)
    state = torch.get_rng_state()
    assert GradCache(model, loss_fn, memory=10**9).planned(PackedBatch.concat(batches())).peak_bytes > 100_000
    assert torch.equal(state, torch.get_rng_state())
    assert model.seen
    assert first.grad is None
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in others)


def test_keeping_stops_where_memory_is_really_used(monkeypatch):
    """The guard looks at the process, not at the prediction."""
    model, (queries, documents) = tiny_embedder().double(), batches(400, 600)
    used = iter([0, *(n * 80_000_000 for n in range(1000))])
    monkeypatch.setattr(planner, "used_bytes", lambda device: next(used))
    cache = GradCache(model, loss_fn, memory=200_000_000)
    _, grads = gradients(model, lambda: cache.step(queries, documents))
    assert 1 <= cache.last.kept < cache.last.chunks <= cache.last.plan.kept
    _, truth = gradients(model, uncached(model, queries, documents))
    assert_close(grads, truth, 1e-12)


def test_a_step_over_its_budget_corrects_the_next(monkeypatch, said):
    model = tiny_embedder()
    cache = GradCache(model, loss_fn, memory=3_000_000)
    monkeypatch.setattr(PeakMemory, "stop", lambda self: setattr(self, "peak_bytes", 5_000_000))
    cache.step(*batches())
    first = cache.last
    assert any("the step took 5 MiB, more than its 3 MiB" in line for line in said.messages)
    cache.step(*batches())
    assert cache.last.plan != first.plan
    assert passes.checkpointed_parts(model)


def test_the_ranks_of_a_machine_share_its_memory(monkeypatch):
    give_back(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = free_bytes(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(torch.device("cpu")) == pytest.approx(alone / 4, rel=0.5)
