"""What choosing data does: filters, hard negatives and mixing, on small models trained the same way from several seeds.

    python benchmarks/data_selection/run.py --data FOLDER --teacher FOLDER --out runs.jsonl [--seeds 3] [--only filters]

Each line of the output is one trained and measured model; a run that is there already is not made again. `table.py`
makes the tables of docs/data.md from it.
"""

import argparse
import gzip
import json
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pyqemb.curation import consistency, mine, similarity
from pyqemb.curation.similarity import pair_scores
from pyqemb.data.example import Example, write_examples
from pyqemb.data.tokenizer import Tokenizer
from pyqemb.demo.tokenizer import train_tokenizer
from pyqemb.evaluation import rank
from pyqemb.evaluation.metrics import ndcg_at_k
from pyqemb.model.embedder import Embedder
from pyqemb.model.encoder import open_encoder
from pyqemb.model.families.qwen3 import Qwen3Config
from pyqemb.training import stage2, train

LONGEST = 400  # characters of a text
TEST, POOL = 800, 4000
CORRUPTED = 0.3


@dataclass(frozen=True)
class Task:
    """Training pairs, held-out pairs, and the documents that these are searched in. No positive is on both sides."""

    name: str
    train: list[Example]
    test: list[Example]
    pool: list[str]


def load(folder: Path, name: str, count: int) -> Task:
    with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    pairs = {row["positive"][:LONGEST]: row["query"][:LONGEST] for row in rows}  # one query a document
    chosen = random.Random(0).sample(sorted(pairs.items()), min(len(pairs), count + POOL))
    examples = [Example(query, positive, task=name) for positive, query in chosen]
    pool = [example.positive for example in examples[: min(POOL, len(examples) // 3)]]
    return Task(name, examples[len(pool) :], examples[: min(TEST, len(pool))], pool)


class Saved:
    """The teacher, each text encoded once and kept on disk between runs."""

    def __init__(self, folder: str, cache: Path):
        self.folder, self.cache, self.rows = folder, cache, {}
        if (cache / "texts.json").exists():
            self.rows = {text: row for row, text in enumerate(json.loads((cache / "texts.json").read_text()))}
            self.vectors = np.load(cache / "vectors.npy")

    def prepare(self, texts: list[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self.rows]
        if not new:
            return
        vectors = open_encoder(self.folder).encode_document(new)
        self.vectors = np.concatenate([self.vectors, vectors]) if self.rows else vectors
        self.rows.update({text: len(self.rows) + i for i, text in enumerate(new)})
        self.cache.mkdir(parents=True, exist_ok=True)
        np.save(self.cache / "vectors.npy", self.vectors)
        (self.cache / "texts.json").write_text(json.dumps(list(self.rows)))

    def encode_document(self, texts: list[str]) -> np.ndarray:
        return self.vectors[[self.rows[text] for text in texts]]

    def encode_query(self, texts: list[str], instruction: str | None = None) -> np.ndarray:
        return self.encode_document(texts)


def corrupt(examples: list[Example], share: float) -> tuple[list[Example], set[Example]]:
    """Positives of a share of the pairs passed round among them; and which pairs are wrong now."""
    wrong = random.Random(1).sample(range(len(examples)), int(share * len(examples)))
    changed = list(examples)
    for here, there in zip(wrong, wrong[1:] + wrong[:1], strict=True):
        changed[here] = replace(examples[here], positive=examples[there].positive)
    return changed, {changed[i] for i in wrong}


def filters(teacher: Saved, examples: list[Example]) -> dict[str, list[Example]]:
    scores = pair_scores(teacher, examples)

    def between(low: float, high: float) -> list[Example]:
        bounds = np.quantile(scores, [low, high])
        return [e for e, score in zip(examples, scores, strict=True) if bounds[0] <= score <= bounds[1]]

    return {
        "none": examples,
        "similarity >= 0.7": similarity(teacher, examples, min_sim=0.7).kept,
        "similarity >= 0.5": similarity(teacher, examples, min_sim=0.5).kept,
        "similarity, best 70 %": between(0.3, 1),
        "similarity, 30 to 90 %": between(0.3, 0.9),
        "consistency, top 1": consistency(teacher, examples, top=1).kept,
        "consistency, top 5": consistency(teacher, examples, top=5).kept,
        "consistency, top 20": consistency(teacher, examples, top=20).kept,
    }


def negatives(teacher: Saved, examples: list[Example]) -> dict[str, list[Example]]:
    def mined(**options) -> list[Example]:
        return mine(teacher, examples, **{"k": 4, "depth": 50, "max_positive_ratio": None, **options}).examples

    deep = dict(depth=len(examples), sampling="random")
    return {
        "none": [replace(example, negatives=()) for example in examples],
        "random": mined(**deep),
        "top": mined(),
        "TopK-PercPos 0.95": mined(max_positive_ratio=0.95),
        "margin 0.1": mined(margin=0.1),
        "random of the best 50 under 0.95": mined(max_positive_ratio=0.95, sampling="random"),
    }


class Lab:
    """Trains and measures; every result is a line of the output."""

    def __init__(self, out: Path):
        self.out = out
        self.done = {json.loads(line)["key"] for line in out.read_text().splitlines()} if out.exists() else set()

    def run(
        self, experiment: str, variant: str, seed: int, data: list[list[Example]], tasks: list[Task], **facts
    ) -> None:
        names = "+".join(task.name for task in tasks)
        key = f"{experiment} | {names} | {variant} | {seed}"
        if key in self.done:
            return
        start = time.time()
        with tempfile.TemporaryDirectory() as folder:
            model = self._train(Path(folder), data, tasks, seed, **facts)
            scores = {task.name: self._measure(model, task) for task in tasks}
        row = {
            "key": key, "experiment": experiment, "tasks": names, "variant": variant, "seed": seed,
            "rows": sum(map(len, data)), "ndcg@10": scores, "seconds": round(time.time() - start, 1), **facts,
        }  # fmt: skip
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(key, {name: round(score, 4) for name, score in scores.items()}, row["rows"], row["seconds"], flush=True)

    def _train(
        self, folder: Path, data: list[list[Example]], tasks: list[Task], seed: int, alpha: float = 1.0,
        num_negatives: int = 1, steps: int = 150, **_,
    ) -> Embedder:  # fmt: skip
        texts = [text for task in tasks for e in task.train for text in (e.query, e.positive)]
        tokenizer = Tokenizer(train_tokenizer(texts, vocab_size=8000), 64)
        config = Qwen3Config(
            vocab_size=tokenizer.vocab_size, hidden_size=128, intermediate_size=256, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=128, rope_theta=1e4,
            is_causal=False, eos_token_id=tokenizer.end_id,
        )  # fmt: skip
        embedder = Embedder.from_config(config, tokenizer, seed=seed)
        embedder.default_instruction = None
        embedder.save_pretrained(folder / "base")
        paths = []
        for task, examples in zip(tasks, data, strict=True):
            paths.append({"path": str(folder / f"{task.name}.jsonl")})
            write_examples(paths[-1]["path"], examples)
        result = train(stage2(
            model={"base": str(folder / "base"), "max_length": 64}, data=paths, loss={"temperature": 0.05},
            train={
                "steps": steps, "global_batch_size": 256, "num_negatives": num_negatives, "learning_rate": 5e-3,
                "betas": (0.9, 0.95), "seed": seed, "schedule": "linear", "tokens_per_chunk": 65536, "log_every": 1000,
                "mixing_alpha": alpha,
            },
            save={"dir": str(folder / "run"), "every": None},
        ))  # fmt: skip
        return Embedder.from_pretrained(result.folder)

    @staticmethod
    def _measure(model: Embedder, task: Task) -> float:
        """Mean nDCG@10 of the held-out queries."""
        queries = model.encode_query([example.query for example in task.test])
        _, found = rank(queries, model.encode_document(task.pool), 10)
        return float(np.mean([
            ndcg_at_k([task.pool[i] for i in row], {example.positive: 1.0}, 10)
            for row, example in zip(found, task.test, strict=True)
        ]))  # fmt: skip


def jobs(data: Path, teacher: Saved, seeds: int, only: str | None) -> Iterator[tuple]:
    debian, code = load(data, "debian_en", 8000), load(data, "docstring2code", 6000)
    for task in (debian, code):
        teacher.prepare([text for e in task.train for text in (e.query, e.positive)])
    prepared = []
    if only in (None, "filters"):
        for task in (debian, code):
            for share in (CORRUPTED, 0.0):
                examples, wrong = corrupt(task.train, share) if share else (task.train, set())
                chosen = filters(teacher, examples)
                half = random.Random(2).sample(examples, len(chosen["consistency, top 1"]))
                chosen["random, as many as top 1"] = half
                if share:
                    chosen["without the wrong pairs"] = [e for e in examples if e not in wrong]
                for variant, kept in chosen.items():
                    facts = {"corrupted": share, "kept": len(kept) / len(examples)}
                    if share:
                        caught = sum(e in wrong for e in examples) - sum(e in wrong for e in kept)
                        facts |= {
                            "caught": caught / len(wrong),
                            "lost": (len(examples) - len(kept) - caught) / (len(examples) - len(wrong)),
                        }
                    name = "filters, 30 % wrong" if share else "filters"
                    prepared.append((name, variant, [kept], [task], facts))
    if only in (None, "negatives"):
        for task in (debian, code):
            for variant, examples in negatives(teacher, task.train).items():
                prepared.append(("negatives", variant, [examples], [task], {}))
                more = {"num_negatives": 4, "steps": 300}
                prepared.append(("four negatives, 300 steps", variant, [examples], [task], more))
    if only in (None, "mixing"):
        tasks = [
            load(data, "debian_en", 16000),
            load(data, "wordnet_ex2gloss", 8000),
            code,
            load(data, "manpages", 4000),
        ]
        for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
            prepared.append(
                ("mixing", f"alpha {alpha}", [task.train for task in tasks], tasks, {"alpha": alpha, "steps": 300})
            )
    for seed in range(seeds):
        for experiment, variant, examples, tasks, facts in prepared:
            yield experiment, variant, seed, examples, tasks, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", required=True, help="a sentence-transformers folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "data_selection")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=["filters", "negatives", "mixing"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    lab = Lab(args.out)
    for experiment, variant, seed, examples, tasks, facts in jobs(
        args.data, Saved(args.teacher, args.cache), args.seeds, args.only
    ):
        lab.run(experiment, variant, seed, examples, tasks, **facts)


if __name__ == "__main__":
    main()
