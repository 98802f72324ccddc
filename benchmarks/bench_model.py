"""Whole models: encode, and one cached training step, against sentence-transformers on the same weights and texts."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from transformers import Qwen3Model

from pyqemb import ops
from pyqemb.data.batch import PackedBatch
from pyqemb.model.embedder import Embedder
from pyqemb.testing.cases import heavy_tailed, texts_of
from pyqemb.training.grad_cache import GradCache


@pytest.fixture(scope="module")
def ours(folder):
    return Embedder.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return SentenceTransformer(str(folder), device="cpu")


def flops(lengths, config, layers):
    """Forward, per token and layer: linear layers and causal attention."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    linear = 2 * config.hidden_size * (2 * heads * dim + 2 * kv_heads * dim + 3 * config.intermediate_size)
    return layers * sum(n * linear + 2 * n * n * heads * dim for n in lengths) / 1e9


def padded_encode(model, tokenizer, texts, batch):
    """The plain way: transformers' model on padded batches in their order, the last token normalised."""
    sequences = tokenizer.encode_documents(texts)

    @torch.inference_mode()
    def run():
        for first in range(0, len(sequences), batch):
            part = sequences[first : first + batch]
            longest = max(map(len, part))
            ids = torch.tensor([[0] * (longest - len(s)) + s for s in part])
            mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in part])
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state[:, -1]
            torch.nn.functional.normalize(hidden, dim=-1)

    return run


def test_encode(compare, words, folder, ours, theirs):
    lengths = heavy_tailed(32, median=100) + heavy_tailed(32, median=16, seed=1)
    texts = texts_of(words, ours.tokenizer, lengths)
    real = [len(ids) for ids in ours.tokenizer.encode_documents(texts)]
    assert np.abs(ours.encode(texts) - theirs.encode(texts, normalize_embeddings=True)).max() < 1e-5
    peers = {f"sentence-transformers, batch {size}": size for size in (2, 4, 8, 16)}
    model = Qwen3Model.from_pretrained(folder)
    compare(
        f"encode, heavy-tailed, {len(texts)} texts, {sum(real)} tokens, four 0.6B layers",
        lambda: ours.encode(texts),
        {
            **{name: lambda size=size: theirs.encode(texts, batch_size=size) for name, size in peers.items()},
            "transformers, padded by 8": padded_encode(model, ours.tokenizer, texts, 8),
        },
        rounds=2,
        gflop=flops(real, ours.config, ours.config.num_hidden_layers),
    )


def test_cached_step(compare, words, ours, theirs):
    """Loss and gradients of all weights; no optimizer.

    The same weights, texts and loss (multiple negatives ranking).
    """
    count, budget = 16, 1024
    sides = [
        texts_of(words, ours.tokenizer, heavy_tailed(count, median=median, seed=seed), seed)
        for seed, median in enumerate((16, 100))
    ]
    sequences = [ours.tokenizer.encode_documents(side) for side in sides]
    batches, positive = [PackedBatch.pack(side) for side in sequences], torch.arange(count)
    for model in (ours, theirs):
        model.train()

    def loss(queries, documents):
        return ops.info_nce(queries, documents, positive, owner=positive, preset="mnrl", temperature=0.05)

    def our_step():
        ours.zero_grad()
        return GradCache(ours, loss, budget).step(*batches)

    def their_step(**setting):
        def run():
            theirs.zero_grad()
            features = [{k: v for k, v in theirs.preprocess(side).items()} for side in sides]
            value = CachedMultipleNegativesRankingLoss(theirs, **setting)(features, None)
            value.backward()
            return value

        return run

    peers = {
        "sentence-transformers, default (32)": their_step(),
        "sentence-transformers, 4": their_step(mini_batch_size=4),
        f"sentence-transformers, {budget} tokens": their_step(mini_batch_num_tokens=budget),
    }
    losses = {}

    def kept(name, step):
        return lambda: losses.update({name: float(step())})

    lengths = [len(ids) for side in sequences for ids in side]
    compare(
        f"cached step, {count} pairs, {sum(lengths)} tokens, four 0.6B layers",
        kept("ours", our_step),
        {name: kept(name, step) for name, step in peers.items()},
        rounds=1,
        gflop=4 * flops(lengths, ours.config, ours.config.num_hidden_layers),
    )
    assert max(losses.values()) - min(losses.values()) < 1e-3
