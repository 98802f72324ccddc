"""The pages that tell how to do something: every block runs, in order, on a tiny model under the name of a real one;
the site builds.
"""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pyqemb
from pyqemb import Embedder
from pyqemb.curation.config import CurateConfig
from pyqemb.synthesis.config import SynthesisConfig
from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import TrainConfig, load_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SECTIONS = "tutorials", "how-to", "concepts"
# of the pages outside of these folders
IN_ORDER = "get-started.md", "troubleshooting.md", "faq.md", "objectives.md", "reranking.md", "data.md", "mining.md"
PAGES = sorted(  # every page of a user that has blocks
    page
    for page in [
        *(page for section in SECTIONS for page in (DOCS / section).glob("*.md")),
        *map(DOCS.joinpath, IN_ORDER),
    ]
    if "```" in page.read_text(encoding="utf-8")
)
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NEEDS = {  # packages beside those of the extra `test`, or that extras install
    "data-formats.md": ["datasets"],
    "export.md": ["sentence_transformers"],
    "from-sentence-transformers.md": ["sentence_transformers", "datasets", "accelerate"],
    "mteb.md": ["mteb"],
    "reproduce-qwen3-embedding.md": ["pandas", "sentence_transformers"],
    "transformers.md": ["transformers"],
    "vector-databases.md": ["langchain_core", "chromadb", "llama_index.core", "lancedb"],
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """What the pages take to be there: a base model, a released one, pairs, a corpus, a development set."""
    base = write_tiny_folder(
        tmp_path / "Qwen" / "Qwen3-0.6B-Base", prefix=True, max_position_embeddings=2048, num_hidden_layers=1
    )
    (base / "tokenizer_config.json").write_text(
        '{"pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    weights = load_file(base / "model.safetensors")  # louder, so that texts differ
    noisy = {
        name: w + 0.2 * torch.randn(w.shape, generator=torch.Generator().manual_seed(0)) for name, w in weights.items()
    }
    noisy["lm_head.weight"] = noisy["model.embed_tokens.weight"].clone()
    save_file(noisy, base / "model.safetensors", metadata={"format": "pt"})
    Embedder.from_pretrained(base).save_pretrained(tmp_path / "Qwen" / "Qwen3-Embedding-0.6B")
    draw = random.Random(0)
    words = ["print", "page", "open", "dialog", "file", "menu", "colour", "line", "text", "table"]
    rows = [
        {"query": " ".join(draw.sample(words, 3)), "positive": f"{' '.join(draw.sample(words, 5))} {i}"}
        for i in range(40)
    ]

    def lines(path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in content))

    lines(tmp_path / "pairs.jsonl", rows)
    lines(tmp_path / "corpus.jsonl", [{"_id": str(i), "text": row["positive"]} for i, row in enumerate(rows)])
    lines(
        tmp_path / "dev" / "corpus.jsonl",
        [{"_id": str(i), "text": f"other {row['positive'][::-1]}"} for i, row in enumerate(rows)],
    )
    lines(tmp_path / "dev" / "queries.jsonl", [{"_id": "q", "text": "how do I zip?"}])
    (tmp_path / "dev" / "qrels").mkdir()
    (tmp_path / "dev" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t3\t1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page, workplace, run_line):
    for library in NEEDS.get(page.name, ()):
        pytest.importorskip(library)
    names: dict = {}
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks
    for language, title, code in blocks:
        if language == "python":
            if title:
                Path(title).write_text(code)
            exec(compile(code, f"{page.name}", "exec"), names)
        elif language == "console":
            for line in filter(None, map(str.strip, code.splitlines())):
                run_line(line)
        elif language == "toml":
            Path(title).write_text(code)
            if "[model]" in code:
                load_config(title)
        elif language == "bash":
            Path(title).write_text(code)
            subprocess.run(["bash", "-n", title], check=True)
        elif language == "text":
            continue  # what was printed
        else:
            assert language == "json"
            assert all(isinstance(json.loads(line), dict) for line in code.splitlines())


@pytest.mark.deep
@pytest.mark.parametrize("fails", [0, 1])
def test_the_batch_script_trains_and_comes_back_after_a_failure(workplace, fails):
    """On a cluster of this machine alone, whose commands note their arguments."""
    page = ROOT / "docs" / "how-to" / "several-machines.md"
    for language, title, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language in ("bash", "toml"):
            Path(title).write_text(code)
    run = 'NODES=1 GPUS=1 PORT=0 RESTARTS=0 exec "$@"'
    commands = {
        "scontrol": 'echo "$@" >> calls; echo localhost; echo other',
        "srun": 'echo "$@" >> calls; shift; ' + ("exit 1" if fails else run),
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    (workplace / "bin").mkdir()
    for name, line in commands.items():
        (workplace / "bin" / name).write_text(f"#!/bin/bash\n{line}\n")
        (workplace / "bin" / name).chmod(0o755)
    cluster = {
        "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b",
        "PATH": f"{workplace / 'bin'}:{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(["bash", "train.sbatch"], env={**os.environ, **cluster}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    calls = ["show hostnames a,b", "--kill-on-bad-exit=0 bash node.sh localhost", *(["requeue 7"] if fails else [])]
    assert (workplace / "calls").read_text().splitlines() == calls
    assert (workplace / "runs" / "nodes" / "final" / "config.json").exists() == (not fails)


@pytest.mark.deep
@pytest.mark.parametrize("job", ["encode", "mine"])
def test_the_array_scripts(workplace, job):
    """On a cluster of this machine alone, which starts the tasks of an array in another order."""
    page = ROOT / "docs" / "how-to" / "many-machines.md"
    for language, title, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "bash":
            Path(title).write_text(code)
    sbatch = """
echo "$@" >> calls
for word in "$@"; do :; done  # the last one
case "$1" in
    --parsable)
        range=$(grep -oP '(?<=--array=)[0-9-]+' "$word")
        for task in $(seq "${range#*-}" -1 "${range%-*}"); do
            SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_TASK_COUNT=$((${range#*-} + 1)) SLURM_ARRAY_TASK_MIN=0 \
                SLURM_ARRAY_TASK_MAX=${range#*-} SLURM_ARRAY_TASK_STEP=1 bash "$word" >> log || exit 1
        done
        echo 71;;
    *) bash -c "$word" >> log;;
esac
"""
    (workplace / "bin").mkdir()
    for name, line in (("sbatch", sbatch), ("pyqemb", f'exec {sys.executable} -m pyqemb "$@"')):
        (workplace / "bin" / name).write_text(f"#!/bin/bash\n{line}\n")
        (workplace / "bin" / name).chmod(0o755)
    path = f"{workplace / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", f"{job}.sh"], env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    calls, log = ((workplace / name).read_text().splitlines() for name in ("calls", "log"))
    if job == "encode":
        assert calls == ["--parsable encode.sbatch", "--dependency=afterok:71 --wrap pyqemb finish vectors.npy"]
        again = "when all tasks are done, run pyqemb finish vectors.npy"
        assert log == [
            f"task 2 of 3: 0 texts; {again}", f"task 1 of 3: 0 texts; {again}", f"task 0 of 3: 40 texts; {again}",
            "40 texts, vectors of 32 features, written to vectors.npy",
        ]  # fmt: skip
        return
    assert calls == [
        "--parsable mine.sbatch", "--parsable --dependency=afterok:71 mine.sbatch",
        "--dependency=afterok:71 --wrap pyqemb finish negatives.jsonl",
    ]  # fmt: skip
    assert [line.split(";")[0] for line in log[:6]] == [
        "task 2 of 3: encoded", "task 1 of 3: encoded",
        *(f"task {task} of 3: searched" for task in (0, 2, 1, 0)),
    ]  # fmt: skip
    assert log[-1] == "written to negatives.jsonl"
    model = Embedder.from_pretrained("Qwen/Qwen3-Embedding-0.6B")
    corpus = [json.loads(line)["text"] for line in Path("corpus.jsonl").read_text().splitlines()]
    mined = pyqemb.mine(model, "pairs.jsonl", corpus=corpus)
    pyqemb.write_examples("alone.jsonl", mined.examples)
    assert Path("negatives.jsonl").read_bytes() == Path("alone.jsonl").read_bytes()


def test_blocks_of_the_other_pages(workplace):
    """Configurations are read by what reads them; Python runs."""
    kinds = {"[[step]]": CurateConfig, "[endpoint]": SynthesisConfig}
    seen = set()
    for page in sorted(set(DOCS.glob("*.md")) - set(PAGES)):
        for language, _, code in BLOCK.findall(page.read_text(encoding="utf-8")):
            seen.add((page.name, language))
            if language == "python":
                exec(compile(code, page.name, "exec"), {})
            elif language == "toml":
                reader = next((kind for sign, kind in kinds.items() if sign in code), None)
                reader(**tomllib.loads(code)) if reader else TrainConfig(**tomllib.loads(code))
            elif language != "text":
                raise AssertionError(f"{page.name}: a block of {language}, which nothing runs")
    assert seen >= {("scale.md", "toml"), ("curation.md", "toml"), ("synthesis.md", "toml")}


def test_no_block_is_passed_over():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(BLOCK.findall(text)), page


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs"), pytest.importorskip("material"), pytest.importorskip("mkdocstrings")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
        "--config-file",
        str(ROOT / "mkdocs.yml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in ("index.html", "tutorials/reranker/index.html", "reference/ops/index.html"):
        assert (tmp_path / "site" / page).is_file()
    assert "varlen_attention" in (tmp_path / "site" / "reference" / "ops" / "index.html").read_text()
