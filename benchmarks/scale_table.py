"""Writes the tables of docs/scale.md: what fits on how many GPUs of which memory.

    python benchmarks/scale_table.py            # writes the page
    python benchmarks/scale_table.py --check    # exit code 1 where the page differs

The numbers are those of `pyqemb train --dry-run --world N --gpu-memory SIZE`.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pyqemb.model.embedder import Embedder
from pyqemb.model.families import FAMILIES, build_decoder
from pyqemb.model.lora import LoraConfig, add_lora
from pyqemb.testing.tiny import tiny_tokenizer
from pyqemb.training.config import ParallelSection, TrainConfig
from pyqemb.training.parallel.layout import rank_memory, units_of
from pyqemb.training.rank_plan import RankPlan, RankPlanner, Ranks

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
SHAPES = Path(__file__).parent / "shapes"
MODELS = "Qwen3-0.6B", "Qwen3-4B", "Qwen3-8B"
GPUS, MEMORIES = (1, 2, 8, 16, 64), (24, 48, 80, 141)  # GB
QUERIES, NEGATIVES, QUERY_TOKENS, DOCUMENT_TOKENS = 512, 7, 32, 256
GOOD_CHUNK = 4096  # tokens; smaller chunks leave a GPU idle
NEARLY = 1.05
_BEGIN, _END = "<!-- made by benchmarks/scale_table.py: {} -->", "<!-- end -->"


def model_of(name: str, lora: bool) -> Embedder:
    """A model of that shape on the meta device."""
    config = FAMILIES["qwen3"].config.from_dict(json.loads((SHAPES / f"{name}.json").read_text(encoding="utf-8")))
    with torch.device("meta"):
        model = Embedder(build_decoder(config), tiny_tokenizer())
        if lora:
            add_lora(model.model, LoraConfig())
    return model


def planner_of(model: Embedder) -> RankPlanner:
    """Plans steps of stage 2 with texts of fixed lengths."""
    documents = QUERIES * (1 + NEGATIVES)

    def heaviest(ranks: int) -> np.ndarray:
        return np.repeat([DOCUMENT_TOKENS, QUERY_TOKENS], [-(-documents // ranks), -(-QUERIES // ranks)])

    config = TrainConfig(model={"base": ""}, data=[{"path": ""}], train={"global_batch_size": QUERIES})
    return RankPlanner(config, model, torch.bfloat16, "cuda", heaviest, documents + QUERIES)


def best_plan(planner: RankPlanner, gpus: int, memory: int) -> RankPlan | None:
    """The fewest shards that are nearly the cheapest, with good chunks where these fit; None: nothing fits."""
    shards = [2**n for n in range(gpus.bit_length())]
    plans = [planner.plan(Ranks(gpus, memory * 10**9), ParallelSection(shard=shard)) for shard in shards]
    fitting = [each for each in plans if each.fits]
    good = [each for each in fitting if each.plan.tokens_per_chunk >= GOOD_CHUNK] or fitting
    cheapest = min((each.plan.cost for each in good), default=0.0)
    return next((each for each in good if each.plan.cost <= NEARLY * cheapest), None)


def cell(plan: RankPlan | None) -> str:
    """Shards, the highest memory of a rank, tokens of a chunk, and what is done to fit."""
    if plan is None:
        return "-"
    marks = "".join(mark for mark, on in (("c", plan.plan.checkpointing), ("r", plan.plan.reshard)) if on)
    return f"{plan.shard} / {plan.peak / 1e9:.0f} GB / {plan.plan.tokens_per_chunk}{' ' + marks if marks else ''}"


def fits_table(planner: RankPlanner) -> Iterator[str]:
    """A row for each number of GPUs, a column for each memory."""
    yield "| GPUs | " + " | ".join(f"{memory} GB" for memory in MEMORIES) + " |"
    yield "| ---: |" + " --- |" * len(MEMORIES)
    for gpus in GPUS:
        yield f"| {gpus} | " + " | ".join(cell(best_plan(planner, gpus, memory)) for memory in MEMORIES) + " |"


def kinds_table() -> Iterator[str]:
    """The bytes of a rank that do not depend on the batch."""
    yield "| model | shards | weights | moments | gathered weights | gradients | reduction |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name in MODELS:
        units = units_of(model_of(name, lora=False))
        for shard in (1, 8, 64):
            memory = rank_memory(units, shard, torch.bfloat16)
            sizes = memory.weights, memory.moments, memory.gathered, memory.gradients, memory.reduction
            yield f"| {name} | {shard} | " + " | ".join(f"{size / 1e9:.1f}" for size in sizes) + " |"


def tables() -> Iterator[tuple[str, str]]:
    """The name of each table and its lines."""
    yield "bytes by kind", "\n".join(kinds_table())
    for name in MODELS:
        for lora in (False, True):
            yield f"{name}, {'LoRA' if lora else 'full'}", "\n".join(fits_table(planner_of(model_of(name, lora))))


def filled(page: str) -> str:
    """The page with every table made anew. ValueError: the page lacks one."""
    for name, table in tables():
        begin = _BEGIN.format(name)
        head, found, rest = page.partition(begin)
        _, ended, tail = rest.partition(_END)
        if not found or not ended:
            raise ValueError(f"{PAGE}: has no {begin} ... {_END}")
        page = f"{head}{begin}\n{table}\n{_END}{tail}"
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    before = PAGE.read_text(encoding="utf-8")
    now = filled(before)
    if not check:
        PAGE.write_text(now, encoding="utf-8")
    return int(check and now != before)


if __name__ == "__main__":
    sys.exit(main())
