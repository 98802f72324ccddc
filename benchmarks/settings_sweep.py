"""Small training runs behind docs/how-to/choose-settings.md and docs/how-to/read-the-log.md.

    python benchmarks/settings_sweep.py run --out runs.jsonl [--only log] [--seeds 2]
    python benchmarks/settings_sweep.py draw --out runs.jsonl     # the tables on standard output, the plots of the docs

Each line of the output is one run: its settings, its evaluations and, for the plots, its curves. A run that is there
already is not made again. The data ship with pyqemb: German and French paragraphs of the LibreOffice help, each with
its English paragraph; the evaluation asks held-out pages.
"""

import argparse
import io
import json
import math
import random
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pyqemb import Embedder, mine, write_examples
from pyqemb.data.example import Example
from pyqemb.data.tokenizer import Tokenizer
from pyqemb.demo.help_data import load_rows
from pyqemb.demo.tokenizer import train_tokenizer
from pyqemb.evaluation import DevSets
from pyqemb.model.families.qwen3 import Qwen3Config
from pyqemb.training import stage2, train

ROOT = Path(__file__).parents[1]
PLOTS = ROOT / "docs" / "assets" / "plots"
LANGUAGES = "de", "fr"
QUERIES = 300  # of each language
CURVES = "loss", "positive", "negative", "masked", "grad_norm"
BESIDE = {"false negatives": "without false negatives", "wrong positives, temperature 0.002": "wrong positives"}
NOT_DRAWN = "without false negatives", "temperature 0.002"
BASE = {
    "steps": 100, "global_batch_size": 128, "num_negatives": 0, "learning_rate": 5e-3, "schedule": "linear",
    "betas": (0.9, 0.95), "tokens_per_chunk": 32768, "log_every": 1000,
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One setting of one experiment; `loss` and `train` are changes to the base run."""

    experiment: str
    name: str
    train: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    data: str = "pairs"


def variants() -> Iterator[Variant]:
    """All runs, those of the plots first."""
    yield Variant("log", "healthy")
    yield Variant("log", "learning rate x 20", train={"learning_rate": 1e-1})
    yield Variant("log", "learning rate : 100", train={"learning_rate": 5e-5})
    yield Variant("log", "temperature 0.002", loss={"temperature": 0.002})
    yield Variant("log", "false negatives", train={"num_negatives": 1}, data="false negatives")
    yield Variant("log", "without false negatives", data="false negatives")
    yield Variant("log", "wrong positives", data="wrong positives")
    yield Variant("log", "few distinct pairs", data="few distinct pairs")
    yield Variant("log", "wrong positives, temperature 0.002", loss={"temperature": 0.002}, data="wrong positives")
    for rate in (2e-4, 1e-3, 5e-3, 2e-2, 5e-2):
        yield Variant("learning rate", f"{rate:g}", train={"learning_rate": rate})
    for temperature in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2):
        yield Variant("temperature", f"{temperature:g}", loss={"temperature": temperature})
    for size in (32, 128, 512):
        yield Variant("batch size, 100 steps", str(size), train={"global_batch_size": size})
    for size in (32, 128, 512):
        changes = {"global_batch_size": size, "steps": 100 * 128 // size}
        yield Variant("batch size, 12,800 pairs", str(size), train=changes)
    for count in (0, 1, 3, 7):
        yield Variant("hard negatives", str(count), train={"num_negatives": count}, data="mined")
    for preset in ("qwen3", "qwen3_stage2", "mnrl"):
        yield Variant("preset", preset, loss={"preset": preset})


class Lab:
    """Data, base model and evaluation in a work folder; runs are appended to `out`."""

    def __init__(self, work: Path, out: Path):
        self.work, self.out = work, out
        self.rows = load_rows("train")
        self.done = {(row["experiment"], row["name"], row["seed"]) for row in read(out)}
        if not (work / "dev").exists():
            self._write_dev()
            self._write_base()

    def _write_dev(self) -> None:
        rows, folder = load_rows("dev"), self.work / "dev"
        documents = {text: f"d{i}" for i, text in enumerate(dict.fromkeys(row["en"] for row in rows))}
        asked = [(row[key], row["en"]) for key in LANGUAGES for row in [r for r in rows if key in r][:QUERIES]]
        (folder / "qrels").mkdir(parents=True)
        write_lines(folder / "corpus.jsonl", [{"_id": name, "text": text} for text, name in documents.items()])
        write_lines(folder / "queries.jsonl", [{"_id": f"q{i}", "text": text} for i, (text, _) in enumerate(asked)])
        lines = [f"q{i}\t{documents[answer]}\t1\n" for i, (_, answer) in enumerate(asked)]
        (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))

    def _write_base(self) -> None:
        texts = [row[key] for row in self.rows for key in ("en", *LANGUAGES) if key in row]
        tokenizer = Tokenizer(train_tokenizer(texts, vocab_size=8000), 64)
        config = Qwen3Config(
            vocab_size=tokenizer.vocab_size, hidden_size=128, intermediate_size=256, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
            rope_theta=10_000.0, is_causal=False, eos_token_id=tokenizer.end_id,
        )  # fmt: skip
        model = Embedder.from_config(config, tokenizer, seed=0)
        model.default_instruction = None
        model.save_pretrained(self.work / "base")

    def data(self, kind: str) -> Path:
        """The file of the training rows of that kind."""
        path = self.work / f"{kind.replace(' ', '_')}.jsonl"
        if not path.exists():
            pairs = [Example(row[key], row["en"]) for row in self.rows for key in LANGUAGES if key in row]
            random.Random(0).shuffle(pairs)
            write_examples(path, self._changed(kind, pairs))
        return path

    def _changed(self, kind: str, pairs: list[Example]) -> list[Example]:
        if kind == "false negatives":  # one half of the document is the positive, the other one the hard negative
            return [replace(pair, positive=one, negatives=(other,)) for pair in pairs for one, other in halves_of(pair)]
        if kind == "wrong positives":  # of 30 % of the pairs
            wrong = len(pairs) * 3 // 10
            return [
                replace(pair, positive=pairs[(i + 1) % wrong].positive) if i < wrong else pair
                for i, pair in enumerate(pairs)
            ]
        if kind == "few distinct pairs":
            return [pair for pair in pairs[:500] for _ in range(26)]
        if kind == "mined":
            model = Embedder.from_pretrained(self.trained(Variant("", "teacher"), 0)[1])
            return mine(model, pairs, k=7, depth=50, max_positive_ratio=0.95).examples
        return pairs

    def trained(self, variant: Variant, seed: int) -> tuple[list[dict[str, Any]], Path]:
        """The rows of the log, and the folder of the final model."""
        folder = Path(tempfile.mkdtemp(dir=self.work))
        config = stage2(
            model={"base": str(self.work / "base"), "max_length": 64},
            data=[{"path": str(self.data(variant.data))}],
            loss={"temperature": 0.05, **variant.loss},
            train={**BASE, **variant.train, "seed": seed},
            eval={
                "data": str(self.work / "dev"),
                "every": 10 if variant.experiment == "log" else None,
                "metric": "ndcg@10",
            },
            save={"dir": str(folder), "every": None, "keep": 1},
        )
        result = train(config, evaluate=DevSets(config.eval))
        return result.metrics, result.folder

    def run(self, variant: Variant, seed: int) -> None:
        """Train, and append the result."""
        if (variant.experiment, variant.name, seed) in self.done:
            return
        start = time.time()
        rows, _ = self.trained(variant, seed)
        steps = [row for row in rows if "eval" not in row]
        evaluations = [(row["step"], row["eval"]["ndcg@10"]) for row in rows if "eval" in row]
        found = {
            "experiment": variant.experiment, "name": variant.name, "seed": seed, "ndcg@10": evaluations[-1][1],
            "loss": [steps[0]["loss"], statistics.mean(row["loss"] or math.nan for row in steps[-10:])],
            "tokens": sum(row["tokens"] for row in steps), "seconds": round(time.time() - start, 1),
        }  # fmt: skip
        if variant.experiment == "log":
            found["evaluations"] = evaluations
            found["curves"] = {name: [rounded(row.get(name)) for row in steps] for name in CURVES}
        with self.out.open("a") as file:
            file.write(json.dumps(found) + "\n")


def halves_of(pair: Example) -> list[tuple[str, str]]:
    """The two halves of a document, in an order that depends on its text; none where it is short."""
    words = pair.positive.split()
    halves = [" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])]
    return [tuple(random.Random(pair.positive).sample(halves, 2))] if len(words) > 7 else []


def read(path: Path) -> list[dict[str, Any]]:
    """The runs that were made."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def table(runs: Sequence[dict[str, Any]], experiment: str) -> Iterator[str]:
    """A row for each setting: nDCG@10 of each seed, their mean, the loss at the end."""
    here = [run for run in runs if run["experiment"] == experiment]
    yield f"| {experiment} | nDCG@10, each seed | mean | last loss |"
    yield "| --- | --- | ---: | ---: |"
    for name in dict.fromkeys(run["name"] for run in here):
        scores = [run["ndcg@10"] for run in here if run["name"] == name]
        loss = statistics.mean(run["loss"][1] for run in here if run["name"] == name)
        each = ", ".join(f"{score:.3f}" for score in scores)
        yield f"| {name} | {each} | {statistics.mean(scores):.3f} | {loss:.2f} |"


def draw(runs: Sequence[dict[str, Any]], folder: Path) -> None:
    """A picture for each run of the experiment `log`: the healthy run, or the one of BESIDE, in grey beside it."""
    log = {run["name"]: run for run in reversed(runs) if run["experiment"] == "log"}
    folder.mkdir(parents=True, exist_ok=True)
    for name, run in log.items():
        if name in NOT_DRAWN:
            continue
        beside = log[BESIDE.get(name, "healthy")]
        file = re.sub(r"\W+", "-", name)
        picture = figure([run] if run is beside else [beside, run])
        (folder / f"log-{file}.svg").write_text(picture, encoding="utf-8")


def figure(runs: Sequence[dict[str, Any]]) -> str:
    """Three panels as SVG: loss, similarities, nDCG@10."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pyqemb", "font.size": 16}):
        whole = Figure(figsize=(10, 3.3), dpi=72, layout="constrained")
        panels = whole.subplots(1, 3)
        for run, color in zip(runs, ("#90a4ae", "#3f51b5")[-len(runs) :], strict=True):
            steps = range(1, len(run["curves"]["loss"]) + 1)
            for panel, name, style in ((0, "loss", "-"), (1, "positive", "-"), (1, "negative", "--")):
                values = [math.nan if value is None else value for value in run["curves"][name]]
                panels[panel].plot(steps, values, style, color=color, linewidth=2)
            panels[2].plot(*zip(*run["evaluations"], strict=True), color=color, linewidth=2)
        titles = "loss", "positive, negative - -", "nDCG@10"
        for panel, title, top in zip(panels, titles, (None, 1.03, 0.8), strict=True):
            panel.set_title(title, fontsize=16)
            panel.set_xlabel("step")
            panel.set_ylim(0 if top is None else -0.02, top)
            panel.xaxis.set_major_locator(MaxNLocator(2))
            panel.yaxis.set_major_locator(MaxNLocator(4))
            panel.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        whole.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.1f}", text.getvalue())
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg[svg.index("<svg") :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "draw"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help="one experiment")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--work", type=Path, help="keeps data and models between calls")
    args = parser.parse_args()
    if args.what == "draw":
        runs = read(args.out)
        for experiment in dict.fromkeys(run["experiment"] for run in runs):
            print("\n".join(table(runs, experiment)), end="\n\n")
        draw(runs, PLOTS)
        return
    with tempfile.TemporaryDirectory() as temporary:
        lab = Lab(args.work or Path(temporary), args.out)
        for seed in range(args.seeds):
            for variant in variants():
                if args.only in (None, variant.experiment) and not (variant.experiment == "log" and seed):
                    lab.run(variant, seed)


if __name__ == "__main__":
    main()
