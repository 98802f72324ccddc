"""Collects the comparisons of a run, prints one table, and writes table, figures and plots to benchmarks/results/."""

import json
import os
import platform
import subprocess
import tempfile
from datetime import date
from pathlib import Path

import pytest
import sentence_transformers
import torch
import transformers

from pyqemb import _C, __version__
from pyqemb.data.tokenizer import Tokenizer
from pyqemb.demo.help_data import load_rows
from pyqemb.demo.tokenizer import train_tokenizer
from pyqemb.model.embedder import Embedder
from pyqemb.model.families.qwen3 import Qwen3Config
from pyqemb.testing import bench

_FOLDER = Path(__file__).parent
_FOUND: list[bench.Comparison] = []


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, default=_FOLDER / "results", help="folder of the result files")
    parser.addoption("--device", default="cuda", help="of benchmarks/cuda")
    parser.addoption(
        "--tiny", action="store_true", help="benchmarks/cuda in seconds: shows that it runs, measures nothing"
    )
    parser.addoption("--without", action="append", default=[], help="a peer of benchmarks/cuda to leave out")
    parser.addoption("--isa", choices=_C.available_isas(), help="instruction set of our kernels; `make bench ISA=avx2`")


def pytest_configure(config):
    # Hazard: torch.compile's cache does not tell instruction sets apart; code of another one has corrupted the heap.
    cache = tempfile.TemporaryDirectory()
    config.add_cleanup(cache.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
    isa = config.getoption("--isa")
    if isa is not None:
        _C.set_isa(isa)
        if torch.backends.cpu.get_cpu_capability().lower() != isa:
            raise pytest.UsageError(f"--isa {isa}: torch runs on {torch.backends.cpu.get_cpu_capability()}")


@pytest.fixture
def compare(benchmark, request):
    """bench.compare(...), recorded under the file's name; pytest-benchmark times ours, the peers run in its set-up."""

    def clock(ours, before, rounds):
        benchmark.pedantic(ours, setup=before, rounds=rounds)
        return list(benchmark.stats.stats.data)

    def run(case, ours, peers, **options):
        family = request.node.path.stem.removeprefix("bench_")
        found = bench.compare(family, case, ours, peers, clock=clock, **options)
        _FOUND.append(found)
        benchmark.extra_info.update({f"ratio to {peer}": found.ratio(peer) for peer in peers})
        return found

    return run


@pytest.fixture(scope="session")
def words():
    return " ".join(row["en"] for row in load_rows("train"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory, words):
    """Four layers of the 0.6B shape with random weights; the vocabulary is small, its size costs no time."""
    tokenizer = Tokenizer(train_tokenizer([words], vocab_size=8000), 512)
    config = Qwen3Config(
        vocab_size=tokenizer.vocab_size, hidden_size=1024, intermediate_size=3072, num_hidden_layers=4,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=1024, rope_theta=1e6,
        is_causal=True, eos_token_id=tokenizer.end_id,
    )  # fmt: skip
    embedder = Embedder.from_config(config, tokenizer, seed=0)
    embedder.default_instruction = None
    return embedder.save_pretrained(tmp_path_factory.mktemp("model"))


def pytest_terminal_summary(terminalreporter, config):
    if not _FOUND:
        return
    environment = _environment()
    table = "\n".join([bench.HEADER, *(row for found in _FOUND for row in found.rows())])
    terminalreporter.write_line(f"\n{environment}\n{table}")
    results, name = config.getoption("--results"), f"{date.today()}-cpu-{_C.current_isa()}"
    results.mkdir(parents=True, exist_ok=True)
    facts = ", ".join(f"{key} {value}" for key, value in environment.items())
    text = (
        f"# `make bench`, {_C.current_isa()}, {date.today()}\n\n{facts}.\n\n"
        "Medians of interleaved rounds in one process; a ratio says how many times as long the peer takes. Extra "
        "memory is the growth of the process during the first call. The ceiling is a large float32"
        f" matrix product (GFLOP/s) or copy (GB/s), timed between the rounds.\n\n{table}\n"
    )
    (results / f"{name}.md").write_text(text)
    record = {"environment": environment, "comparisons": [found.record() for found in _FOUND]}
    (results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    for family in dict.fromkeys(found.family for found in _FOUND):
        _plot([found for found in _FOUND if found.family == family], results / f"{name}-{family}.png")


def _plot(found, path):
    from matplotlib.figure import Figure

    bars = [(f"{f.case}\nagainst {peer}", f.ratio(peer)) for f in found for peer in f.peers]
    if not bars:
        return
    figure = Figure(figsize=(9, 1 + 0.45 * len(bars)), layout="constrained")
    axes = figure.subplots()
    axes.barh([name for name, _ in bars], [ratio for _, ratio in bars], color="#3b6ea5")
    for at, (_, ratio) in enumerate(bars):
        axes.text(ratio, at, f" {ratio:.2f}x", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("the peer's time, ours = 1 (log scale)")
    axes.set_xscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)


def _environment():
    return {
        "cpu": _processor(),
        "kernels": _C.current_isa(),
        "torch's kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "pyqemb": __version__,
        "torch": torch.__version__,
        "sentence-transformers": sentence_transformers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _commit():
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=_FOLDER, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def _processor():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
