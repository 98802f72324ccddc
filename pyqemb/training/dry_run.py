"""The plan of a run, printed by --dry-run."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyqemb.data import mixing
from pyqemb.data.example import Example
from pyqemb.data.loader import TrainingBatch
from pyqemb.data.pairs import PREFIX, SUFFIX
from pyqemb.data.token_cache import TokenCache
from pyqemb.model.device import runs_on_cuda
from pyqemb.model.embedder import Embedder
from pyqemb.model.reranker import Reranker
from pyqemb.model.sentence import check_kind
from pyqemb.model.source import local_folder
from pyqemb.training import groups, preflight, rank_plan
from pyqemb.training.agreement import model_files, model_folder, other_files
from pyqemb.training.callbacks import make_loggers
from pyqemb.training.config import ParallelSection, TrainConfig, with_data
from pyqemb.training.datasets import make_loader, mixture, num_steps, read_datasets
from pyqemb.training.evaluations import Evaluate
from pyqemb.training.grad_cache import GradCache
from pyqemb.training.objectives import Objective
from pyqemb.training.objectives.yes_no import YesNo
from pyqemb.training.optim import warmup_steps
from pyqemb.training.rank_plan import RankPlanner, Ranks
from pyqemb.training.resume import check_continues, flat
from pyqemb.training.setup import check_guided, load_model, pick_precision
from pyqemb.training.state import find

_SAMPLE = 512  # examples of a dataset that are tokenized for the estimate


def plan(
    config: TrainConfig,
    evaluate: Evaluate | None = None,
    resume: str | Path | None = None,
    ranks: Ranks | None = None,
) -> Iterator[str]:
    """Yield the lines that describe a run, after all of its checks but the trial save.

    Args:
        config: the configuration of the run.
        evaluate: as for `train` (default: no evaluation).
        resume: as for `train` (default: a new run).
        ranks: the ranks to plan for, which need not exist; weights are not read, and disk and memory of this machine
            are not checked (default: this machine and one rank).

    Raises:
        PyqembError: the errors that `train` raises before its first step.
    """
    config = with_data(config)
    preflight.check_evaluation(config, evaluate)
    make_loggers(config)
    checkpoint = None
    if ranks is None or resume is not None:
        checkpoint = find(Path(config.save.dir), resume, logging.getLogger("pyqemb").warning)
    model = load_model(config, weights=ranks is None)
    device = model.device if ranks is None else _device_of_ranks(config, model)
    precision = pick_precision(config.train.precision, device)
    datasets = read_datasets(config)
    preflight.set_query_instruction(model, config, datasets.instructions, evaluate)
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = sum(parameter.numel() for parameter in weights.values())
    groups.check_trained(weights, config.train)
    if checkpoint is not None:
        # With `ranks` the folder of the base model may be without weights, so its files are not compared.
        own = config.keeps_base and ranks is None
        base_files = model_files(local_folder(config.model.base)) if own else None
        others = other_files(config) if ranks is None else None
        check_continues(checkpoint, config, datasets.fingerprint, weights, base_files, others)
    if ranks is None:
        preflight.check_output(Path(config.save.dir), groups.checkpoint_bytes(model, config.train), trial=False)
        preflight.check_caches(config)
    loader = make_loader(datasets, config)
    train = config.train
    steps = num_steps(config, loader)
    preflight.warn_of_settings(config, model, datasets, loader, steps)
    kind = f"{model.pooling} pooling" if isinstance(model, Embedder) else "yes or no"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield f"model      {config.model.base}: {parameters / 1e6:.2f} M parameters, {model.attention}, {kind}"
    if config.lora is not None:
        yield f"adapters   rank {config.lora.rank}, {trained / 1e6:.2f} M parameters are trained"
    yield from groups.lines(model, train)
    check_guided(config, datasets)
    for name, section in config.other_models.items() if ranks is None else ():
        check_kind(model_folder(f"{name}.model", section.model), "embedder")
    if config.teacher is not None:
        yield f"teacher    {config.teacher.model}, weight {config.teacher.weight:g}"
    if config.guide is not None:
        yield f"guide      {config.guide.model}, margin {config.guide.margin:g}"
    yield f"device     {device}, {str(precision).removeprefix('torch.')}"
    tokens = 0.0
    for name, examples in datasets.examples.items():
        here = _mean_tokens(model, examples[:_SAMPLE], train.num_negatives, datasets.objectives[name])
        tokens += here * loader.batch_sizes[name] * loader.batches[name] / loader.steps_per_epoch
        yield f"dataset    {name}: {len(examples)} rows, {here:.0f} tokens a row"
    yield from mixing.lines(mixture(loader, steps))
    when = "at the end" if config.eval.every is None else f"every {config.eval.every} steps"
    for dataset in getattr(evaluate, "summary", ()):
        yield f"evaluation {dataset}, {when}"
    size = max(loader.batch_sizes.values())
    hard = min(train.num_negatives, datasets.most_negatives)
    yield f"steps      {steps} ({loader.steps_per_epoch} an epoch), {warmup_steps(steps, train)} of them warm-up"
    yield (
        f"batch      {size} queries, up to {hard} hard negatives each, about {tokens:,.0f} tokens in chunks of "
        f"{train.tokens_per_chunk}"
    )
    if isinstance(model, Embedder):
        yield f"negatives  up to {size * (1 + hard) - 1} documents a query"
    # The plan of the first batch, as in training.
    batch = datasets.objectives[loader.where(0)[0]].build_batch(loader.batch(0), model)
    if ranks is None and config.parallel != ParallelSection():
        yield "memory     not planned: [parallel] shares it among ranks; --world RANKS --gpu-memory SIZE plans theirs"
    elif ranks is None:
        yield _memory_here(config, model, batch, precision, trained)
    else:
        planner = RankPlanner(config, model, precision, device.type, *_texts_of_ranks(model, batch))
        yield from rank_plan.lines(planner, ranks)
    yield from _example(model, next(iter(datasets.examples.values()))[0])


def settings_lines(config: TrainConfig) -> Iterator[str]:
    """Yield a line for each setting that differs from the defaults of stage 2, and one about the others."""
    yield from (f"setting    {name} = {json.dumps(value, ensure_ascii=False)}" for name, value in _changed(config))
    yield "setting    others have their defaults: `pyqemb train --help-config` explains them, --json prints all"


def _changed(config: TrainConfig) -> Iterator[tuple[str, Any]]:
    changed = config.model_dump(mode="json", exclude_defaults=True)
    yield "stage", config.stage
    for name, value in flat({key: value for key, value in changed.items() if key != "stage"}).items():
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            for number, entry in enumerate(value):
                yield from ((f"{name}[{number}].{key}", part) for key, part in flat(entry).items())
        else:
            yield name, value
    if changed.get("lora") == {}:
        yield "lora", {}


def _memory_here(
    config: TrainConfig, model: Embedder | Reranker, batch: TrainingBatch, precision: torch.dtype, trained: int
) -> str:
    """The memory of one process on this machine. ConfigError: it is not enough."""
    train = config.train
    cache = GradCache(model, tokens_per_chunk=train.tokens_per_chunk, memory=train.memory)
    stream = TokenCache(model.tokenizer).pack(batch.texts)
    narrow = 0 if precision == torch.float32 else precision.itemsize  # the compute copy of the weights
    whole = groups.checkpoint_bytes(model, train) + narrow * trained
    preflight.check_memory(cache, stream, whole - 4 * trained, model.device)  # the float32 weights are loaded
    kinds = "weights and moments" if train.ema_decay is None else "weights, moments and average"
    return f"memory     {preflight.in_units(whole)} of {kinds}; {cache.preview(stream)}"


def _device_of_ranks(config: TrainConfig, model: Embedder | Reranker) -> torch.device:
    """A GPU, unless the configuration selects the CPU or the CUDA kernels do not support the model."""
    name = config.train.device.partition(":")[0]
    if name == "auto":
        name = "cuda" if runs_on_cuda(model.config) else "cpu"
    return torch.device(name)


def _texts_of_ranks(model: Embedder | Reranker, batch: TrainingBatch) -> tuple[Callable[[int], np.ndarray], int]:
    """A function of the number of ranks that returns the token counts of the rank with the most tokens; all texts."""
    lengths = np.array([len(ids) for ids in model.tokenizer.encode_documents(batch.texts)], dtype=np.int64)

    def heaviest(ranks: int) -> np.ndarray:
        return max((lengths[part] for part in batch.text_partition(ranks)), key=np.sum)

    return heaviest, len(lengths)


def _example(model: Embedder | Reranker, example: Example) -> Iterator[str]:
    """Lines that show how an example is tokenized."""
    if isinstance(model, Reranker):
        yield f"example    {PREFIX + YesNo.build_batch([example], model).texts[0] + SUFFIX!r}"
        return
    query = model.tokenizer.format_queries([example.query], example.instruction)[0]
    yield f"example    query {query!r} -> ids {model.tokenizer.encode_documents([query])[0]}"
    yield f"           document {example.positive[:200]!r}"


def _mean_tokens(
    model: Embedder | Reranker, examples: Sequence[Example], num_negatives: int, objective: type[Objective]
) -> float:
    """Mean tokens of a row: query, positive, and the sampled negatives."""
    texts = [
        text
        for example in examples
        for text in objective.build_batch(
            [replace(example, negatives=example.negatives[:num_negatives], scores=())], model
        ).texts
    ]
    return sum(map(len, model.tokenizer.encode_documents(texts))) / max(len(examples), 1)
