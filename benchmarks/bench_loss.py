"""info_nce against the formula in torch and the loss stage of sentence-transformers' cached loss, with prefixes too;
top_k.
"""

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.losses.matryoshka import CachedLossDecorator

from pyqemb import ops
from pyqemb.ops.groups import PRESETS
from pyqemb.testing import reference
from pyqemb.testing.tiny import tiny_embedder

PREFIXES = [32, 64, 128, 256, 512, 768, 1024]


def unit(count, dim):
    return F.normalize(torch.randn(count, dim), dim=1).requires_grad_()


def gradients(loss, *vectors):
    return torch.autograd.grad(loss(*vectors), vectors)


@pytest.mark.parametrize(("count", "dim", "rounds"), [(2048, 1024, 5), (8192, 1024, 1)])
def test_info_nce(compare, count, dim, rounds):
    queries, documents, positive = unit(count, dim), unit(count, dim), torch.arange(count)
    compare(
        f"info_nce fwd+bwd, qwen3, N = M = {count}, d = {dim}",
        lambda: gradients(lambda q, d: ops.info_nce(q, d, positive, owner=positive), queries, documents),
        {
            "naive torch": lambda: gradients(
                lambda q, d: reference.info_nce(q, d, positive, positive), queries, documents
            )
        },
        rounds=rounds, gflop=18 * count * count * dim / 1e9,
    )  # fmt: skip


def test_info_nce_huge(compare):
    """One score matrix would take 17 GB: no peer. Watch the extra memory."""
    count, dim = 65536, 256
    queries, documents, positive = unit(count, dim), unit(count, dim), torch.arange(count)
    compare(
        f"info_nce fwd+bwd, mnrl, N = M = {count}, d = {dim}",
        lambda: gradients(
            lambda q, d: ops.info_nce(q, d, positive, owner=positive, preset="mnrl"), queries, documents
        ),
        {}, rounds=1, gflop=6 * count * count * dim / 1e9,
    )  # fmt: skip


@pytest.fixture(scope="module")
def their_model(tmp_path_factory):
    """Their loss asks its model for nothing here but what kind it is."""
    return SentenceTransformer(str(tiny_embedder().save_pretrained(tmp_path_factory.mktemp("model"))), device="cpu")


def theirs(model, batch, queries, documents, prefixes=()):
    """Loss and gradients as one call of their gradient cache makes them, in mini-batches of `batch`."""
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=batch)
    if prefixes:
        # What MatryoshkaLoss does to a cached loss: one of it for each prefix.
        loss.calculate_loss = CachedLossDecorator(loss.calculate_loss, prefixes, [1] * len(prefixes))

    def run():
        parts = [[part.detach().requires_grad_() for part in x.split(batch)] for x in (queries, documents)]
        loss.calculate_loss(parts, with_backward=True)
        return [part.grad for side in parts for part in side]

    return run


def test_loss_stage(compare, their_model):
    count, dim = 4096, 1024
    queries, documents, positive = unit(count, dim), unit(count, dim), torch.arange(count)
    compare(
        f"loss stage of a cached step, N = {count}, d = {dim}",
        lambda: gradients(
            lambda q, d: ops.info_nce(q, d, positive, owner=positive, preset="mnrl", temperature=0.05),
            queries, documents,
        ),
        {
            f"sentence-transformers, {name}": theirs(their_model, size, queries, documents)
            for name, size in {"default (32)": 32, "256": 256, "1024": 1024, "4096": 4096}.items()
        },
        rounds=3, gflop=6 * count * count * dim / 1e9,
    )  # fmt: skip


@pytest.mark.parametrize("preset", ["mnrl", "qwen3"])
def test_matryoshka(compare, their_model, preset):
    """The peer "ours, no prefixes" is what seven prefixes must not exceed by more than half."""
    count, dim, groups = 4096, PREFIXES[-1], PRESETS[preset]
    queries, documents, positive = unit(count, dim), unit(count, dim), torch.arange(count)

    def ours(prefixes):
        return gradients(
            lambda q, d: ops.info_nce(
                q, d, positive, owner=positive, preset=preset, temperature=0.05, matryoshka=prefixes
            ),
            queries, documents,
        )  # fmt: skip

    def naive(prefix):
        return gradients(
            lambda *vectors: reference.info_nce(
                *(F.normalize(x[:, :prefix], dim=1) for x in vectors), positive, positive, temperature=0.05,
                groups=groups
            ),
            queries, documents,
        )  # fmt: skip

    peers = {
        "ours, no prefixes": lambda: ours(None),
        "naive torch, a loss for each": lambda: [naive(prefix) for prefix in PREFIXES],
    }
    if preset == "mnrl":
        peers["sentence-transformers, 1024"] = theirs(their_model, 1024, queries, documents, PREFIXES)
    products = 3 * (1 if preset == "mnrl" else 3)
    compare(
        f"info_nce fwd+bwd, {preset}, seven prefixes, N = M = {count}, d = {dim}",
        lambda: ours(PREFIXES), peers,
        rounds=3, gflop=2 * products * count * count * dim / 1e9,
    )  # fmt: skip


@pytest.mark.parametrize(("count", "corpus"), [(1000, 20_000), (4, 200_000)])
def test_top_k(compare, count, corpus):
    queries, documents = torch.randn(count, 256), torch.randn(corpus, 256)
    compare(
        f"top_k, {count} x {corpus}, d = 256, k = 50",
        lambda: ops.top_k(queries, documents, 50),
        {"torch matmul + topk": lambda: (queries @ documents.T).topk(50)},
        gflop=2 * count * corpus * 256 / 1e9,
    )
