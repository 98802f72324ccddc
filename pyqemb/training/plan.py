"""What a run would do, before it does it: for --dry-run."""

from collections.abc import Iterator, Sequence

import torch

from pyqemb.data import mixing
from pyqemb.data.example import Example
from pyqemb.data.loader import build_batch
from pyqemb.data.token_cache import TokenCache
from pyqemb.model.embedder import Embedder
from pyqemb.training.config import TrainConfig
from pyqemb.training.grad_cache import GradCache
from pyqemb.training.optim import warmup_steps
from pyqemb.training.sets import make_loader, num_steps, read_sets, set_shares
from pyqemb.training.setup import load_model, pick_precision

_SAMPLE = 512  # examples of a set that are tokenised for the estimate
_ACTIVATIONS = (
    34  # floats a token keeps for each hidden feature of a layer, next to its share of the MLP; a rough figure
)


def plan(config: TrainConfig) -> Iterator[str]:
    """Lines to print. Reads the model and all data, so whatever is wrong with them shows here."""
    embedder = load_model(config)
    precision = pick_precision(config.train.precision, embedder.device)
    sets = read_sets(config)
    loader = make_loader(sets, config)
    train = config.train
    steps = num_steps(config, loader)
    parameters = sum(parameter.numel() for parameter in embedder.parameters())
    yield f"model      {config.model.base}: {parameters / 1e6:.2f} M parameters, {embedder.attention}, {embedder.pooling} pooling"
    yield f"device     {embedder.device}, {str(precision).removeprefix('torch.')}"
    tokens = 0.0
    for name, examples in sets.examples.items():
        here = _mean_tokens(embedder, examples[:_SAMPLE], train.num_negatives)
        tokens += here * loader.batch_sizes[name] * loader.batches[name] / loader.steps_per_epoch
        yield f"set        {name}: {len(examples)} rows, {here:.0f} tokens a row"
    yield from mixing.lines(set_shares(loader, steps))
    size = max(loader.batch_sizes.values())
    hard = min(train.num_negatives, sets.most_negatives)
    yield f"steps      {steps} ({loader.steps_per_epoch} an epoch), {warmup_steps(steps, train)} of them warm-up"
    yield f"batch      {size} queries, up to {hard} hard negatives each, about {tokens:,.0f} tokens in chunks of {train.tokens_per_chunk}"
    yield f"negatives  up to {size * (1 + hard) - 1} documents a query"
    if train.memory is None:
        yield f"memory     about {_memory(embedder, config, precision, parameters, tokens, size * (2 + hard)):.2f} GB"
    else:  # of the first batch, as training will plan it (less what one process of several gets)
        texts = build_batch(loader.batch(0), embedder.tokenizer).texts
        yield f"memory     {GradCache(embedder, memory=train.memory).preview(TokenCache(embedder.tokenizer).pack(texts))}"
    example = next(iter(sets.examples.values()))[0]
    query = embedder.tokenizer.format_queries([example.query], example.instruction)[0]
    yield f"example    query {query!r} -> ids {embedder.tokenizer.encode_documents([query])[0]}"
    yield f"           document {example.positive[:200]!r}"


def _mean_tokens(embedder: Embedder, examples: Sequence[Example], num_negatives: int) -> float:
    """Tokens of a row: query, positive, and the negatives that are drawn."""
    texts = [text for e in examples for text in (e.query, e.positive, *e.negatives[:num_negatives])]
    return sum(map(len, embedder.tokenizer.encode_documents(texts))) / max(len(examples), 1)


def _memory(
    embedder: Embedder, config: TrainConfig, precision: torch.dtype, parameters: int, tokens: float, texts: int
) -> float:
    """Gigabytes: float32 weights, gradients and both moments; one chunk's activations; vectors and their gradients."""
    model = embedder.config
    chunk = min(tokens, config.train.tokens_per_chunk)
    layers = 1 if config.train.activation_checkpointing else model.num_hidden_layers
    activations = chunk * layers * (_ACTIVATIONS * model.hidden_size + 5 * model.intermediate_size) * precision.itemsize
    narrow = 0 if precision == torch.float32 else precision.itemsize  # the copy of the weights that computes
    return ((16 + narrow) * parameters + activations + 8 * texts * model.hidden_size) / 1e9
