"""What gradient caching costs over one uncached batch: nothing kept, a third of the graphs, boundary tensors besides,
all.

A ratio is the cached step's time over the uncached one's: 1.33, 1.22, 1.15 and 1.00 in theory (docs/dev/grad_cache.md).
The uncached step holds all graphs at once, about 14 GB.
"""

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

from pyqemb import ops
from pyqemb.data.batch import PackedBatch
from pyqemb.model.embedder import Embedder
from pyqemb.testing.cases import heavy_tailed, texts_of
from pyqemb.training.grad_cache import GradCache, Plan
from pyqemb.training.grad_cache.chunks import chunk

PAIRS, BUDGET, ALL = 256, 4096, 10**6  # of the global batch; tokens of a chunk; more chunks than there are


def test_cost_over_an_uncached_step(compare, words, folder):
    """Loss and gradients of all weights, no optimizer; the same weights, texts and loss (multiple negatives
    ranking).
    """
    ours = Embedder.from_pretrained(folder).train()
    theirs = SentenceTransformer(str(folder), device="cpu").train()
    sides = [
        texts_of(words, ours.tokenizer, heavy_tailed(PAIRS, median=median, seed=seed), seed)
        for seed, median in enumerate((16, 100))
    ]
    queries, documents = (PackedBatch.pack(ours.tokenizer.encode_documents(side)) for side in sides)
    positive, losses = torch.arange(PAIRS), {}
    stream = PackedBatch.concat((queries, documents))
    chunks, _ = chunk(stream, BUDGET)
    third = max(round(len(chunks) / 3), 1)

    def loss_fn(queries_BE, documents_ME):
        return ops.info_nce(queries_BE, documents_ME, positive, owner=positive, preset="mnrl", temperature=0.05)

    def uncached():
        """One graph of all chunks: the same passes as with caching."""
        ours.zero_grad()
        vectors_SE = ours(stream)
        loss = loss_fn(vectors_SE[:PAIRS], vectors_SE[PAIRS:])
        loss.backward()
        losses["uncached"] = float(loss.detach())

    def cached(**plan):
        def run():
            ours.zero_grad()
            cache = GradCache(ours, loss_fn, plan=Plan(BUDGET, **plan))
            losses[str(plan)] = float(cache.step(queries, documents))

        return run

    def peer(**setting):
        def run():
            theirs.zero_grad()
            features = [dict(theirs.preprocess(side)) for side in sides]
            loss = CachedMultipleNegativesRankingLoss(theirs, **setting)(features, None)
            loss.backward()
            losses[str(setting)] = float(loss.detach())

        return run

    compare(
        f"uncached step, {PAIRS} pairs, {stream.num_tokens} tokens, {len(chunks)} chunks, four 0.6B layers",
        uncached,
        {
            "cached, nothing kept": cached(),
            f"cached, {third} of {len(chunks)} graphs kept": cached(kept=third),
            f"cached, {third} graphs and boundary tensors": cached(kept=third, boundaries=ALL),
            "cached, all graphs kept": cached(kept=ALL),
            "sentence-transformers, cached, 8": peer(mini_batch_size=8),
            f"sentence-transformers, cached, {BUDGET} tokens": peer(mini_batch_num_tokens=BUDGET),
        },
        rounds=3,
    )
    assert max(losses.values()) - min(losses.values()) < 1e-3
