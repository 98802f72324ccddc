"""The recipe of the Qwen3 Embedding report as a small script; every step is a public function of pyqemb."""

import json
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import pyqemb
from pyqemb.curation import consistency, mine
from pyqemb.data.example import Example, write_examples
from pyqemb.data.files import atomic_file
from pyqemb.data.machine import writing
from pyqemb.data.tokenizer import Tokenizer
from pyqemb.demo.material import Material
from pyqemb.demo.measure import ModelSearch, best_and_worst, bm25_search, measure
from pyqemb.demo.report import write_report
from pyqemb.demo.results import BM25, UNTRAINED, Results, Row, Step, markdown
from pyqemb.demo.tokenizer import train_tokenizer
from pyqemb.merging import merge
from pyqemb.model.embedder import Embedder
from pyqemb.model.families.qwen3 import Qwen3Config
from pyqemb.training import stage1, stage2, train

Say = Callable[[str], None]
MODEL, CORPUS, RESULTS, REPORT = "model", "corpus.jsonl", "results.json", "report.html"


@dataclass(frozen=True)
class Settings:
    """Sizes and learning rates, chosen by experiments (docs/dev/log.md)."""

    vocab_size: int = 8000
    hidden_size: int = 192
    layers: int = 1
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 384
    batch: int = 512
    steps_stage1: int = 250
    steps_stage2: int = 200
    rate_stage1: float = 2e-3
    rate_stage2: float = 5e-3
    temperature_stage1: float = 0.1
    temperature_stage2: float = 0.05
    negatives: int = 1
    consistent_share: float = 0.5  # a pair is kept if its document is in this share of a sample nearest to its query
    runs: int = 3
    seed: int = 0

    def quick(self) -> "Settings":
        """Settings for tests: every step runs, but the model learns little."""
        return replace(
            self,
            vocab_size=2000,
            hidden_size=64,
            intermediate_size=96,
            heads=2,
            steps_stage1=12,
            steps_stage2=15,
            batch=128,
        )


def run_demo(material: Material, out: Path, settings: Settings, say: Say = print) -> Results:
    """Train, merge and evaluate with a material.

    Writes model/, corpus.jsonl, results.json, table.md and report.html to `out`.
    """
    demo = _Demo(material, out, settings, say)
    demo.run()
    return demo.results


def untrained_model(material: Material, settings: Settings) -> Embedder:
    """A model with random weights, and a tokenizer that is trained on the texts of the material."""
    s = settings
    tokenizer = Tokenizer(train_tokenizer(material.texts, vocab_size=s.vocab_size), material.max_length)
    config = Qwen3Config(
        vocab_size=tokenizer.vocab_size, hidden_size=s.hidden_size, intermediate_size=s.intermediate_size,
        num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.kv_heads,
        head_dim=s.head_dim, max_position_embeddings=512, rope_theta=10_000.0, is_causal=False,
        eos_token_id=tokenizer.end_id,
    )  # fmt: skip
    embedder = Embedder.from_config(config, tokenizer, seed=s.seed)
    embedder.default_instruction = None
    return embedder


class _Demo:
    def __init__(self, material: Material, out: Path, settings: Settings, say: Say):
        self.material, self.out, self.settings, self.say = material, out, settings, say
        self.work = out / "work"
        with writing(out):
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir(parents=True)
        self.results = Results(
            material.name,
            list(material.groups),
            list(material.corpora),
            facts=dict(material.facts),
            environment=_environment(),
        )

    def run(self) -> None:
        base = self.make_base()
        self.measure(UNTRAINED, base)
        with self.step(BM25):
            self.add(measure(BM25, bm25_search, self.material, self.settings.seed))

        weak = self.write("weak", self.material.weak)
        first = self.train("stage 1", stage1, base, weak)
        self.measure("stage 1 alone", first)

        hard = self.write("supervised", self.choose_pairs(first))
        alone = self.train("stage 2 alone", stage2, base, hard)
        self.measure("stage 2 alone", alone)
        finished = []
        for number in range(1, self.settings.runs + 1):
            name = f"stage 1 + 2, run {number}"
            finished.append(self.train(name, stage2, first, hard, seed=number))
            self.measure(name, finished[-1])

        with self.step("slerp"):
            report = merge(finished, "slerp", out=self.out / MODEL)
        self.say(f"  angles between the runs: up to {report.max_angle:.1f} degrees")
        search = self.measure("merged", self.out / MODEL)
        self.results.best, self.results.worst = best_and_worst(search, self.material)
        self.finish()

    def make_base(self) -> Path:
        """Make a tokenizer and a model from scratch."""
        with self.step("tokenizer"):
            embedder = untrained_model(self.material, self.settings)
        self.results.facts["parameters"] = sum(p.numel() for p in embedder.parameters())
        return embedder.save_pretrained(self.work / "base")

    def train(self, name: str, stage: Callable[..., Any], base: Path, data: Path, seed: int = 0) -> Path:
        s = self.settings
        steps, rate, temperature = (
            (s.steps_stage1, s.rate_stage1, s.temperature_stage1)
            if stage is stage1
            else (s.steps_stage2, s.rate_stage2, s.temperature_stage2)
        )
        config = stage(
            model={"base": str(base), "max_length": self.material.max_length},
            data=[{"path": str(data)}],
            loss={"temperature": temperature},
            train={
                "steps": steps, "global_batch_size": s.batch, "num_negatives": s.negatives, "learning_rate": rate,
                "betas": (0.9, 0.95), "seed": s.seed + seed, "log_every": 50, "schedule": "linear",
                "tokens_per_chunk": 65536,
            },
            save={"dir": str(self.work / name.replace(" ", "_").replace(",", "")), "every": None},
        )  # fmt: skip
        with self.step(name):
            result = train(config)
        wanted = ("step", "loss", "positive", "negative", "masked")
        self.results.curves[name] = [
            {key: row[key] for key in wanted} for row in result.metrics if row.get("loss") is not None
        ]
        return result.folder

    def choose_pairs(self, folder: Path) -> list[Example]:
        """The supervised pairs that pass the consistency check of the stage-1 model, with its hard negatives."""
        embedder, s = Embedder.from_pretrained(folder), self.settings
        pairs, kept = list(self.material.supervised), []
        with self.step("consistency"):
            size = 2000  # pairs of a sample; each query is compared with the documents of its sample
            for start in range(0, len(pairs), size):
                sample = pairs[start : start + size]
                kept += consistency(embedder, sample, top=max(1, int(s.consistent_share * len(sample)))).kept
        with self.step("mining"):
            mined = mine(embedder, kept, k=max(s.negatives, 1), depth=30)
        facts = self.results.facts
        facts["supervised pairs dropped by the consistency check"] = len(pairs) - len(kept)
        facts["pairs without a hard negative"] = sum(not example.negatives for example in mined.examples)
        return mined.examples

    def measure(self, name: str, folder: Path) -> ModelSearch:
        with self.step(f"evaluation: {name}"):
            search = ModelSearch(Embedder.from_pretrained(folder))
            self.add(measure(name, search, self.material, self.settings.seed, str(folder)))
        return search

    def add(self, row: Row) -> None:
        self.results.rows.append(row)
        self.say(f"  {row.name}: mean nDCG@10 {self.results.mean(row.name)}")

    def write(self, name: str, examples: Sequence[Example]) -> Path:
        path = self.work / f"{name}.jsonl"
        write_examples(path, examples)
        return path

    def finish(self) -> None:
        self.results.model = str(self.out / MODEL)
        documents = list(self.material.corpora.values())[-1]
        with atomic_file(self.out / CORPUS) as path:
            lines = (json.dumps({"text": d.text, "source": d.source}, ensure_ascii=False) for d in documents)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.results.save(self.out / RESULTS)
        with atomic_file(self.out / "table.md") as path:
            path.write_text(markdown(self.results), encoding="utf-8")
        with self.step("report"):
            write_report(self.out / REPORT, self.results)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.results.steps.append(Step(name, seconds, memory))
        self.say(f"{name}: {seconds:.1f} s, peak memory {memory:.2f} GiB")


def _environment() -> dict[str, str]:
    return {
        "pyqemb": pyqemb.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "machine": platform.machine(),
    }
