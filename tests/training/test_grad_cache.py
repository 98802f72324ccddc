"""Cached gradients against those of one big batch without caching."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import pyqemb
from pyqemb import ops
from pyqemb.data.batch import PackedBatch
from pyqemb.ops.groups import PRESETS
from pyqemb.testing import reference
from pyqemb.testing.cached_step import Dropping, assert_close, backward, batches, gradients, loss_fn, uncached
from pyqemb.testing.tiny import tiny_embedder
from pyqemb.training.grad_cache import GradCache, Plan, embed_with_cache, embed_without_graph, loss_and_cache, passes

ALL = 10**6  # more chunks, or tokens, than there are
PLANS = [
    Plan(1),
    Plan(40),
    Plan(100),
    Plan(250),
    Plan(ALL),
    Plan(60, kept=1),
    Plan(60, kept=3),
    Plan(60, kept=ALL),
    Plan(60, boundaries=2),
    Plan(60, boundaries=ALL),
    Plan(60, kept=2, boundaries=ALL),
    Plan(60, kept=1, boundaries=1),
    Plan(60, checkpointing=True),
    Plan(60, kept=1, boundaries=ALL, checkpointing=True),
]


@pytest.mark.promise("R13", "one large batch")
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_equals_one_big_batch(plan, dtype, tolerance):
    model = tiny_embedder().to(dtype)
    queries, documents = batches()
    truth_loss, truth = gradients(model, uncached(model, queries, documents))
    cache = pyqemb.GradCache(model, loss_fn, plan=plan)
    loss, grads = gradients(model, lambda: cache.step(queries, documents))
    assert loss == pytest.approx(truth_loss, rel=tolerance)
    assert_close(grads, truth, tolerance)
    assert cache.last.kept == min(plan.kept, cache.last.chunks) or cache.last.chunks == 1
    assert not model.model.checkpointing


LOSSES = {
    "both directions": dict(preset="gte"),
    "both directions, split": dict(preset="gte", softmax="split"),
    "debiased": dict(preset="gte", tau_plus=0.005),
    "guide": dict(
        preset="gte", guide=(torch.randn(7, 5, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64))
    ),
    "several positives": dict(preset="gte", more_positives=torch.tensor([[0, 9], [0, 10], [3, 11]])),
}


@pytest.mark.promise("R13", "losses of several sweeps against the dense formula without a cache")
@pytest.mark.parametrize("plan", [Plan(1), Plan(100), Plan(60, kept=2, boundaries=ALL)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_several_sweeps_equal_one_big_batch(name, plan):
    model, (queries, documents) = tiny_embedder().double(), batches()
    positive, owner = torch.arange(7), torch.tensor([*range(7), *range(5)])
    options = LOSSES[name]

    def loss(q, d):
        return ops.info_nce(q, d, positive, owner=owner, temperature=0.2, **options)

    def dense(q, d):
        given = dict(
            temperature=0.2, groups=PRESETS["gte"], split=options.get("softmax") == "split",
            tau_plus=options.get("tau_plus", 0.0), guide=options.get("guide"),
        )  # fmt: skip
        if "more_positives" in options:
            return reference.several_positives(q, d, [[0, 9, 10], [1], [2], [3, 11], [4], [5], [6]], owner, **given)
        return reference.info_nce(q, d, positive, owner, **given)

    truth_loss, truth = gradients(model, lambda: backward(dense(model(queries), model(documents))))
    cache = pyqemb.GradCache(model, loss, plan=plan)
    value, grads = gradients(model, lambda: cache.step(queries, documents))
    assert value == pytest.approx(truth_loss, rel=1e-11)
    assert_close(grads, truth, 1e-11)


@pytest.mark.promise("R13", "chunks of 1, 3, N - 1, N and more texts")
@pytest.mark.parametrize("size", [1, 3, 18, 19, 40])
def test_chunks_of_any_number_of_texts(size):
    model, generator = tiny_embedder().double(), torch.Generator().manual_seed(0)
    queries, documents = (
        PackedBatch.pack(torch.randint(0, 380, (count, 10), generator=generator).tolist()) for count in (7, 12)
    )
    truth_loss, truth = gradients(model, uncached(model, queries, documents))
    cache = GradCache(model, loss_fn, plan=Plan(10 * size))
    loss, grads = gradients(model, lambda: cache.step(queries, documents))
    assert cache.last.chunks == -(-19 // size)
    assert loss == pytest.approx(truth_loss, rel=1e-12)
    assert_close(grads, truth, 1e-12)


@pytest.mark.promise("R13", "one side without a gradient")
@pytest.mark.parametrize("plan", [Plan(60), Plan(60, kept=2), Plan(60, boundaries=ALL)], ids=str)
def test_a_side_without_gradient(plan):
    model, (queries, documents) = tiny_embedder().double(), batches()
    _, truth = gradients(model, lambda: backward(loss_fn(model(queries), model(documents).detach())))
    cache = GradCache(model, lambda q, d: loss_fn(q, d.detach()), plan=plan)
    _, grads = gradients(model, lambda: cache.step(queries, documents))
    assert_close(grads, truth, 1e-12)


RANKS = """
import sys
import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from pyqemb import ops
from pyqemb.data.batch import PackedBatch
from pyqemb.testing.cached_step import batches
from pyqemb.testing.tiny import tiny_embedder
from pyqemb.training.grad_cache import GradCache, Plan
from pyqemb.training.parallel.world import joined

torch.set_num_threads(1)
calls = []
real = dist.all_reduce
dist.all_reduce = lambda *given, **options: calls.append(1) or real(*given, **options)
with joined("cpu") as (world, _):
    assert world.size == 2
    model, stream = tiny_embedder().double(), PackedBatch.concat(batches())
    partition = [np.arange(rank, 19, 2) for rank in range(2)]
    cache = GradCache(model, plan=Plan(60))
    forward = cache.forward(stream.select(partition[world.rank]))
    own = forward.embeddings.requires_grad_()
    vectors, rows = world.all_gather(own, partition), world.local_range(7)
    loss = ops.info_nce(
        vectors[:7], vectors[7:], torch.arange(7), temperature=0.1, rows=(rows.start, rows.stop - rows.start)
    )
    cache.backward(forward, torch.autograd.grad(loss, own)[0])
    calls.clear()
    world.all_reduce_gradients(model.parameters())
    assert len(calls) == 1, calls
    whole = world.all_reduce_(loss.detach().clone())
    if world.is_first:
        save_file({"loss": whole, **{n: p.grad.contiguous() for n, p in model.named_parameters()}}, sys.argv[1])
"""


@pytest.mark.promise("R13", "two ranks give the gradient of one, with one all-reduce")
def test_two_ranks_give_the_gradient_of_one(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            str(tmp_path / "ranks.py"), str(tmp_path / "grads.safetensors"),
        ],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "grads.safetensors")
    model = tiny_embedder().double()
    truth_loss, truth = gradients(model, uncached(model, *batches()))
    assert float(found.pop("loss")) == pytest.approx(truth_loss, rel=1e-12)
    assert_close(found, truth, 1e-12)


def test_the_order_of_the_texts_does_not_matter():
    model, (queries, documents) = tiny_embedder().double(), batches()
    _, truth = gradients(model, uncached(model, queries, documents))
    order = torch.randperm(7)
    turned = torch.cat([order, torch.arange(7, 12).flip(0)])
    cache = GradCache(model, loss_fn, plan=Plan(60, kept=1, boundaries=2))
    _, grads = gradients(model, lambda: cache.step(queries.select(order), documents.select(turned)))
    assert_close(grads, truth, 1e-12)


@pytest.mark.promise("R13", "the second forward pass has the bits of the first")
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_the_second_forward_has_the_bits_of_the_first(pooling, is_causal):
    """With boundary tensors too; and what is kept changes no bit of the gradient but by the order of the chunks."""
    embedder = tiny_embedder(pooling=pooling, is_causal=is_causal)
    seen = []
    embedder.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    for plan in (Plan(60), Plan(60, boundaries=ALL)):
        seen.clear()
        GradCache(embedder, loss_fn, plan=plan).step(*batches())
        half = len(seen) // 2
        assert half > 2
        assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


def test_equal_texts_are_encoded_once():
    model, (queries, documents) = tiny_embedder().double(), batches()
    documents = PackedBatch.concat([documents.select([0, 1, 2, 3, 4, 5, 0, 2, 0]), queries.select([1, 1])])
    _, truth = gradients(model, uncached(model, queries, documents))
    cache = GradCache(model, loss_fn, 60)
    _, grads = gradients(model, lambda: cache.step(queries, documents))
    assert_close(grads, truth, 1e-12)
    assert cache.last.sequences == 18
    assert cache.last.distinct == 13


def test_copies_of_a_text_see_their_own_dropout():
    model, (queries, _) = Dropping().train(), batches()
    cache = GradCache(model, loss_fn, ALL)
    cache.step(queries, queries.select([0] * 7))
    assert cache.last.distinct == cache.last.sequences == 14
    masks = model.seen[0][7:] == 0
    assert not torch.equal(masks[0], masks[1])


def test_gradients_accumulate():
    model, (queries, documents) = tiny_embedder().double(), batches()
    cache = GradCache(model, loss_fn, 50)
    _, once = gradients(model, lambda: cache.step(queries, documents))
    _, twice = gradients(model, lambda: cache.step(queries, documents) + cache.step(queries, documents))
    for name, gradient in twice.items():
        torch.testing.assert_close(gradient, 2 * once[name])


@pytest.mark.promise("R13", "a scaled loss")
@pytest.mark.parametrize("plan", [Plan(60), Plan(60, kept=2), Plan(60, kept=ALL)], ids=str)
def test_the_gradient_is_scaled(plan):
    model, (queries, documents) = tiny_embedder().double(), batches()
    truth_loss, truth = gradients(model, uncached(model, queries, documents))
    cache = GradCache(model, loss_fn, plan=plan)
    scaled = {name: 0.25 * gradient for name, gradient in truth.items()}
    loss, grads = gradients(model, lambda: cache.step(queries, documents, scale=0.25))
    assert loss == pytest.approx(truth_loss, rel=1e-12)  # the loss itself is not scaled
    assert_close(grads, scaled, 1e-12)
    loss, grads = gradients(model, lambda: backward(0.25 * cache(queries, documents)))
    assert loss == pytest.approx(0.25 * truth_loss, rel=1e-12)
    assert_close(grads, scaled, 1e-12)


@pytest.mark.promise("R13", "two forward passes before one backward")
@pytest.mark.parametrize("plan", [Plan(60), Plan(60, kept=2, boundaries=ALL)], ids=str)
def test_two_forwards_before_one_backward(plan):
    model = tiny_embedder().double()
    first, second = batches(seed=1), batches(seed=2)

    def truth():
        return backward(sum(loss_fn(model(q), model(d)) * w for (q, d), w in ((first, 1.0), (second, -0.5))))

    cache = GradCache(model, loss_fn, plan=plan)
    truth_loss, expected = gradients(model, truth)
    loss, grads = gradients(model, lambda: backward(cache(*first) - 0.5 * cache(*second)))
    assert loss == pytest.approx(truth_loss, rel=1e-12)
    assert_close(grads, expected, 1e-12)


def test_the_loss_of_a_call_can_go_backward_twice():
    model, (queries, documents) = tiny_embedder().double(), batches()
    _, truth = gradients(model, uncached(model, queries, documents))

    def step():
        loss = GradCache(model, lambda q, d: (q @ d.T).logsumexp(1).mean(), plan=Plan(60, kept=2))(queries, documents)
        loss.backward(retain_graph=True)
        once = {name: p.grad.clone() for name, p in model.named_parameters()}
        loss.backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, 2 * once[name])
        return loss.detach()

    gradients(model, step)


@pytest.mark.promise("R13", "dropout is replayed")
@pytest.mark.parametrize("plan", [Plan(60), Plan(60, kept=2), Plan(60, boundaries=ALL)], ids=str)
def test_dropout_is_replayed(plan):
    model = Dropping().train()
    cache = GradCache(model, loss_fn, plan=plan)
    before = torch.get_rng_state()
    loss = cache.step(*batches())
    after = torch.get_rng_state()
    chunks = cache.last.chunks
    first, second = model.seen[:chunks], model.seen[chunks:]
    assert len(second) == chunks - plan.kept > 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=False)), "the second pass saw other masks"
    assert (first[0] == 0).any()
    # The step leaves the generator as its first pass has, so that the next step draws new masks.
    torch.set_rng_state(before)
    again = GradCache(model, loss_fn, plan=Plan(60, kept=ALL)).step(*batches())
    assert torch.equal(loss, again)
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.promise("R13", "the tests see generators that are not restored, and a scale that is lost")
def test_a_broken_replay_or_scale_is_seen(monkeypatch):
    """What the tests above compare differs by far more than their tolerances once the mechanism is broken."""

    def run(plan):
        torch.manual_seed(3)
        model = Dropping(torch.float64).train()
        return gradients(model, lambda: GradCache(model, loss_fn, plan=plan).step(*batches(), scale=0.25))[1]

    truth = run(Plan(60, kept=ALL))
    assert_close(run(Plan(60)), truth, 1e-12)
    with monkeypatch.context() as patch:
        patch.setattr(passes.RngState, "restore", lambda self, device: None)
        with pytest.raises(AssertionError):
            assert_close(run(Plan(60)), truth, 1e-2)
    step = GradCache.step_stream
    monkeypatch.setattr(GradCache, "step_stream", lambda self, stream, loss_of, scale: step(self, stream, loss_of))
    with pytest.raises(AssertionError):
        assert_close(run(Plan(60)), truth, 1e-2)


def test_gradients_with_dropout_are_those_of_one_graph():
    """Kept chunks are never embedded again: with all of them kept the masks cannot differ."""
    model, grads = Dropping(torch.float64).train(), []
    for plan in (Plan(60, kept=ALL), Plan(60), Plan(60, kept=1, boundaries=2), Plan(60, checkpointing=True)):
        torch.manual_seed(3)
        grads.append(gradients(model, lambda plan=plan: GradCache(model, loss_fn, plan=plan).step(*batches()))[1])
    for other in grads[1:]:
        assert_close(other, grads[0], 1e-12)


@pytest.mark.promise("R13", "autocast")
@pytest.mark.parametrize("plan", [Plan(60), Plan(60, kept=2), Plan(60, boundaries=ALL)], ids=str)
@pytest.mark.parametrize("how", ["within", "functions", "call"])
def test_autocast_is_replayed(plan, how):
    """Also where the second pass is called outside of it, and inside another one."""
    model, (queries, documents) = tiny_embedder(), batches()
    stream = PackedBatch.concat((queries, documents))
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, i, output: seen.append(output.dtype))

    def pair_loss(vectors):
        return loss_fn(vectors[:7], vectors[7:])

    def whole():
        with torch.autocast("cpu", torch.bfloat16):
            loss = pair_loss(model(stream))
        return backward(loss)

    def cached():
        with torch.autocast("cpu", torch.bfloat16):
            if how == "within":
                return GradCache(model, loss_fn, plan=plan).step(queries, documents)
            if how == "call":
                loss = GradCache(model, loss_fn, plan=plan)(queries, documents)
            else:
                record = embed_without_graph(model, [stream.select(range(9)), stream.select(range(9, 19))], plan.kept)
                loss, cache = loss_and_cache(pair_loss, record.vectors_UE)
        if how == "call":
            return backward(loss)
        with torch.autocast("cpu", torch.float16):
            embed_with_cache(model, record, cache)
        return loss

    truth_loss, truth = gradients(model, whole)
    seen.clear()
    loss, grads = gradients(model, cached)
    assert len(seen) > 1
    assert set(seen) == {torch.bfloat16}
    assert loss == pytest.approx(truth_loss, rel=1e-2)
    assert_close(grads, truth, 0.1)


def test_frozen_parts_stay_frozen():
    model, (queries, documents) = tiny_embedder(), batches()
    model.model.embed_tokens.weight.requires_grad_(False)
    GradCache(model, loss_fn, 60).step(queries, documents)
    assert model.model.embed_tokens.weight.grad is None
    assert model.model.norm.weight.grad is not None


@pytest.mark.parametrize("plan", [Plan(60), Plan(60, kept=2), Plan(60, boundaries=ALL), Plan(ALL)], ids=str)
def test_all_but_the_last_layer_frozen(plan):
    model = tiny_embedder().double().requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    _, truth = gradients(model, uncached(model, *batches()))
    _, grads = gradients(model, lambda: GradCache(model, loss_fn, plan=plan).step(*batches()))
    assert_close(grads, truth, 1e-12)
    assert model.model.embed_tokens.weight.grad is None


@pytest.mark.parametrize("plan", [Plan(60), Plan(60, kept=2, boundaries=ALL), Plan(ALL)], ids=str)
def test_everything_frozen_gives_the_loss(plan):
    model, (queries, documents) = tiny_embedder().requires_grad_(False), batches()
    loss = GradCache(model, loss_fn, plan=plan).step(queries, documents)
    assert float(loss) == pytest.approx(float(loss_fn(model(queries), model(documents))), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_the_loss_may_learn_too():
    model, (queries, documents) = tiny_embedder().double(), batches()
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def learning(q, d):
        return torch.nn.functional.cross_entropy(q @ d.T / temperature, torch.arange(7))

    backward(learning(model(queries), model(documents)))
    truth, temperature.grad = temperature.grad, None
    assert truth != 0
    cache = GradCache(model, learning, 60)
    cache.step(queries, documents, scale=0.5)
    torch.testing.assert_close(temperature.grad, 0.5 * truth, rtol=1e-12, atol=0)
    backward(0.5 * cache(queries, documents))
    torch.testing.assert_close(temperature.grad, truth, rtol=1e-12, atol=0)


def test_a_stream_and_its_loss():
    model, (queries, documents) = tiny_embedder().double(), batches()
    _, truth = gradients(model, uncached(model, queries, documents))
    cache, shapes = GradCache(model, tokens_per_chunk=60), []

    def loss_of(vectors):
        shapes.append(vectors.shape)
        return loss_fn(vectors[:7], vectors[7:])

    _, grads = gradients(model, lambda: cache.step_stream(PackedBatch.concat((queries, documents)), loss_of))
    assert_close(grads, truth, 1e-12)
    # A process without texts takes part in the loss all the same.
    loss = cache.step_stream(PackedBatch.pack([]), lambda vectors: shapes.append(vectors.shape) or vectors.sum())
    assert shapes == [(19, 32), (0, 32)]
    assert loss == 0


def test_a_loss_that_is_not_finite_adds_nothing():
    model, (queries, documents) = tiny_embedder(), batches()
    own = torch.ones((), requires_grad=True)
    for plan in (Plan(50), Plan(50, kept=2), Plan(ALL)):
        loss = GradCache(model, lambda q, d: (q.sum() + d.sum()) * own * torch.nan, plan=plan).step(queries, documents)
        assert torch.isnan(loss)
        assert own.grad is None
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.promise("R24", "one rank of two")
def test_all_processes_leave_out_a_loss_that_is_not_finite_on_one():
    model, (queries, documents) = tiny_embedder(), batches()
    for plan in (Plan(60), Plan(60, kept=2, boundaries=2), Plan(ALL)):
        cache = GradCache(model, plan=plan)
        record = cache.forward(PackedBatch.concat((queries, documents)))
        assert torch.isfinite(loss_fn(record.embeddings[:7], record.embeddings[7:]))
        cache.discard(record)
        assert cache.last is record.report
        assert not record.encoded.graphs
        assert not record.encoded.boundaries
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("plan", [Plan(60), Plan(60, kept=2), Plan(ALL)], ids=str)
def test_the_phases_of_a_step(plan):
    """The caller takes the loss between them; texts that come twice add their gradients up."""
    model, (queries, documents) = tiny_embedder().double(), batches()
    documents = PackedBatch.concat([documents, queries.select([1, 1])])
    _, truth = gradients(model, uncached(model, queries, documents))
    cache = GradCache(model, plan=plan)

    def phases():
        record = cache.forward(PackedBatch.concat((queries, documents)))
        assert record.embeddings.shape == (21, 32)
        assert not record.embeddings.requires_grad
        embeddings = record.embeddings.requires_grad_()
        loss = loss_fn(embeddings[:7], embeddings[7:])
        cache.backward(record, torch.autograd.grad(loss, embeddings)[0])
        return loss.detach()

    _, grads = gradients(model, phases)
    assert_close(grads, truth, 1e-12)
    assert cache.last.distinct == 19
    record = cache.forward(queries)
    with pytest.raises(ValueError, match=r"gradient must have the shape of the embeddings, \[7, 32\], got \[7, 31\]"):
        cache.backward(record, torch.zeros(7, 31))
    with pytest.raises(TypeError, match="record must be a ForwardRecord, got Tensor"):
        cache.backward(torch.zeros(7, 32), torch.zeros(7, 32))


def test_bad_arguments():
    model, (_, documents) = tiny_embedder(), batches()
    with pytest.raises(ValueError, match="tokens_per_chunk must be at least 1"):
        GradCache(model, loss_fn, 0)
    with pytest.raises(ValueError, match=r"skip must lie in 0\.\.1, got 1\.5"):
        GradCache(model, loss_fn, skip=1.5)
    with pytest.raises(ValueError, match="memory must be a number of bytes, 'auto' or None, got 'all'"):
        GradCache(model, loss_fn, memory="all")
    with pytest.raises(ValueError, match="memory and plan exclude each other"):
        GradCache(model, loss_fn, memory="auto", plan=Plan(5))
    for pair in ((PackedBatch.pack([]), documents), (documents, PackedBatch.pack([]))):
        with pytest.raises(ValueError, match="expected queries and documents, got"):
            GradCache(model, loss_fn).step(*pair)
        with pytest.raises(ValueError, match="expected queries and documents, got"):
            GradCache(model, loss_fn)(*pair)
    with pytest.raises(ValueError, match="expected a loss_fn"):
        GradCache(model).step(documents, documents)
