"""Whole models of the 0.6B shape in bfloat16, random weights: encode, and one training step with its optimiser."""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from transformers import Qwen3Model

from pyqemb import ops
from pyqemb.data.batch import PackedBatch
from pyqemb.data.tokenizer import Tokenizer
from pyqemb.demo.tokenizer import train_tokenizer
from pyqemb.model.embedder import Embedder
from pyqemb.model.families.qwen3 import Qwen3Config
from pyqemb.testing.cases import heavy_tailed, texts_of
from pyqemb.testing.device_bench import OURS
from pyqemb.training.config import TrainSection
from pyqemb.training.grad_cache import GradCache
from pyqemb.training.optim import Optimizer

DTYPE = torch.bfloat16
LONGEST = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory, words, sizes, device):
    """The vocabulary is small: its size costs memory, hardly time."""
    tokenizer = Tokenizer(train_tokenizer([words], vocab_size=8000), LONGEST)
    config = Qwen3Config(
        vocab_size=tokenizer.vocab_size, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim, max_position_embeddings=2 * LONGEST, rope_theta=1e6, is_causal=True,
        eos_token_id=tokenizer.end_id,
    )  # fmt: skip
    embedder = Embedder.from_config(config, tokenizer, seed=0, dtype=DTYPE)
    embedder.default_instruction = None
    return embedder.save_pretrained(tmp_path_factory.mktemp("model"))


def gflop(lengths, sizes):
    """Forward: linear layers and causal attention."""
    heads = sizes.heads * sizes.head_dim
    linear = 2 * sizes.hidden * (2 * heads + 2 * sizes.kv_heads * sizes.head_dim + 3 * sizes.intermediate)
    return sizes.layers * sum(n * linear + 2 * n * n * heads for n in lengths) / 1e9


def sentence_transformer(folder, device):
    return SentenceTransformer(str(folder), device=str(device), model_kwargs={"dtype": DTYPE})


def transformers_encode(folder, device, compiled, sequences, batch):
    """Compiled, on batches sorted by length and padded to a multiple of 64, so that few shapes are compiled."""
    model = Qwen3Model.from_pretrained(folder, dtype=DTYPE).to(device)
    run = compiled(model, dynamic=True)
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    batches = []
    for first in range(0, len(order), batch):
        part = [sequences[index] for index in order[first : first + batch]]
        longest = -(-max(map(len, part)) // 64) * 64
        ids = torch.tensor([[0] * (longest - len(s)) + list(s) for s in part])
        mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in part])
        batches.append((ids, mask))

    @torch.inference_mode()
    def work():
        vectors = []
        for ids, mask in batches:
            hidden = run(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state[:, -1]
            vectors.append(torch.nn.functional.normalize(hidden.float(), dim=-1))
        return torch.cat(vectors)[torch.tensor(order).argsort().to(device)]

    return work


def test_encode(measure, meter, device, sizes, compiled, words, folder):
    count = 4 * sizes.pairs
    lengths = heavy_tailed(count // 2, 100, cap=LONGEST) + heavy_tailed(count // 2, 16, seed=1)
    tokenizer = Tokenizer.from_folder(folder, None)
    texts = texts_of(words, tokenizer, lengths)
    sequences = tokenizer.encode_documents(texts)

    def ours():
        model = Embedder.from_pretrained(folder, device=device)
        return lambda: torch.from_numpy(model.encode(texts)).to(device)

    def theirs(batch):
        model = sentence_transformer(folder, device)
        return lambda: model.encode(
            texts, batch_size=batch, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
        )

    measure(
        f"encode, {count} texts, {sum(map(len, sequences))} tokens",
        {
            OURS: ours,
            **{f"sentence-transformers, batch {n}": lambda n=n: theirs(n) for n in (32, 128)},
            "transformers, compiled, batch 64": lambda: transformers_encode(folder, device, compiled, sequences, 64),
        },
        dtype=DTYPE, gflop=gflop(map(len, sequences), sizes), rounds=min(5, meter.rounds), host_calls=1,
    )  # fmt: skip


def test_training_step(measure, meter, device, sizes, words, folder):
    """Gradients of one big batch and the update. The peer's AdamW works on bfloat16 weights, ours on float32 ones."""
    count, budget = sizes.pairs, sizes.tokens
    tokenizer = Tokenizer.from_folder(folder, None)
    sides = [
        texts_of(words, tokenizer, heavy_tailed(count, median, seed=seed, cap=LONGEST), seed)
        for seed, median in enumerate((16, 100))
    ]
    sequences = [tokenizer.encode_documents(side) for side in sides]
    positive = torch.arange(count, device=device)

    def loss(queries, documents):
        return ops.info_nce(queries, documents, positive, owner=positive, preset="mnrl", temperature=0.05)

    def ours():
        model = Embedder.from_pretrained(folder, dtype=torch.float32, device=device).train()
        optimizer, batches = Optimizer(model, TrainSection(), DTYPE), [PackedBatch.pack(side) for side in sequences]

        def work():
            optimizer.zero_grad()
            value = GradCache(model, loss, budget).step(*batches)
            optimizer.clip()
            optimizer.step(1e-6)
            return value

        return work

    def theirs(**setting):
        model = sentence_transformer(folder, device).train()
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        features = [
            {k: v.to(device) if torch.is_tensor(v) else v for k, v in model.preprocess(side).items()} for side in sides
        ]

        def work():
            adamw.zero_grad()
            value = CachedMultipleNegativesRankingLoss(model, **setting)([dict(side) for side in features], None)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step()
            return value.detach()

        return work

    lengths = [len(ids) for side in sequences for ids in side]
    measure(
        f"training step, {count} pairs, {sum(lengths)} tokens",
        {
            OURS: ours,
            **{f"sentence-transformers, batch {n}": lambda n=n: theirs(mini_batch_size=n) for n in (32, 128)},
            f"sentence-transformers, {budget} tokens": lambda: theirs(mini_batch_num_tokens=budget),
        },
        dtype=DTYPE, gflop=4 * gflop(lengths, sizes), rounds=min(5, meter.rounds), host_calls=1,
    )  # fmt: skip
