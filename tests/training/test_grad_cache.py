import pytest
import torch
from torch import nn

import pyqemb
from pyqemb import ops
from pyqemb.data.batch import PackedBatch
from pyqemb.testing.tiny import tiny_embedder
from pyqemb.training.grad_cache import GradCache


def batches(queries=7, documents=12, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def texts(count):
        lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
        return PackedBatch.pack([torch.randint(0, 380, (n,), generator=generator).tolist() for n in lengths])

    return texts(queries), texts(documents)


def loss_fn(queries, documents):
    positive = torch.arange(len(queries))
    return ops.info_nce(queries, documents, positive, temperature=0.1)


def gradients(model, step):
    model.zero_grad()
    loss = step()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert grads and all(g.abs().sum() > 0 for g in grads.values()), "a vacuous comparison"
    return float(loss), grads


def uncached(model, queries, documents):
    def step():
        loss = loss_fn(model(queries), model(documents))
        loss.backward()
        return loss.detach()

    return step


@pytest.mark.parametrize("tokens", [1, 40, 100, 250, 10**6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_one_big_batch(tokens, dtype, tolerance):
    model = tiny_embedder().to(dtype)
    queries, documents = batches()
    truth_loss, truth = gradients(model, uncached(model, queries, documents))
    cache = pyqemb.GradCache(model, loss_fn, tokens_per_chunk=tokens)
    loss, grads = gradients(model, lambda: cache.step(queries, documents))
    assert loss == pytest.approx(truth_loss, rel=tolerance)
    for name, gradient in grads.items():
        assert float((gradient - truth[name]).norm() / truth[name].norm()) < tolerance, name


def test_gradients_accumulate():
    model, (queries, documents) = tiny_embedder().double(), batches()
    cache = GradCache(model, loss_fn, 50)
    _, once = gradients(model, lambda: cache.step(queries, documents))
    _, twice = gradients(model, lambda: cache.step(queries, documents) + cache.step(queries, documents))
    for name, gradient in twice.items():
        torch.testing.assert_close(gradient, 2 * once[name])


def test_dropout_is_replayed():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedder, self.dropout, self.seen = tiny_embedder(), nn.Dropout(0.3), []

        def forward(self, batch):
            vectors = self.dropout(self.embedder(batch))
            self.seen.append(vectors.detach().clone())
            return vectors

    model = Dropping().train()
    queries, documents = batches()
    GradCache(model, loss_fn, 60).step(queries, documents)
    half = len(model.seen) // 2
    assert half > 2
    first, second = model.seen[:half], model.seen[half:]
    assert all(any(torch.equal(a, b) for b in second) for a in first), "the second pass saw other masks"
    assert (first[0] == 0).any()


def test_frozen_parts_stay_frozen():
    model, (queries, documents) = tiny_embedder(), batches()
    model.model.embed_tokens.weight.requires_grad_(False)
    GradCache(model, loss_fn, 60).step(queries, documents)
    assert model.model.embed_tokens.weight.grad is None
    assert model.model.norm.weight.grad is not None


def test_a_loss_that_is_not_finite_adds_nothing():
    model, (queries, documents) = tiny_embedder(), batches()
    for tokens in (50, 10**6):
        loss = GradCache(model, lambda q, d: (q.sum() + d.sum()) * torch.nan, tokens).step(queries, documents)
        assert torch.isnan(loss) and all(p.grad is None for p in model.parameters())


def test_bad_arguments():
    model, (_, documents) = tiny_embedder(), batches()
    with pytest.raises(ValueError, match="tokens_per_chunk must be at least 1"):
        GradCache(model, loss_fn, 0)
    with pytest.raises(ValueError, match="expected queries and documents, got 0 and 12"):
        GradCache(model, loss_fn).step(PackedBatch.pack([]), documents)
