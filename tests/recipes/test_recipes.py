"""The recipes, on a tiny model and a few texts; a local server stands for the language model."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import load_config

RECIPES = Path(__file__).parents[2] / "recipes"
SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"
SIZES = {"qwen3-embedding-0.6b": "Qwen3-0.6B", "qwen3-embedding-4b": "Qwen3-4B", "qwen3-embedding-8b": "Qwen3-8B"}


def answer(messages):
    """What a good model would answer."""
    prompt = messages[-1]["content"]
    number = re.search(r"passage number (\d+)", prompt)[1]
    if "question_type:" in prompt:
        offered = re.search(r"   - (\w+):", prompt)[1]
        level = re.search(r"One of: (\w+)", prompt)[1]
        return json.dumps({"character": "a reader", "question_type": offered, "difficulty": level})
    if "Write the query" in prompt:
        return json.dumps({"query": f"who built bridge {number}?"})
    if "Right passage" in prompt:
        return json.dumps({"passage": f"Another bridge, near {number}."})
    if "Translate" in prompt:
        return json.dumps({"translation": f"Brücke {number}"})
    if "sentence1" in prompt:
        return json.dumps({"sentence1": f"First {number}.", "sentence2": f"Second {number}."})
    labels = {"label": "good", "wrong_labels": ["bad", "worse", "worst"]}
    return json.dumps({"task": "Classify it", "text": f"text {number}", **labels})


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def work(tmp_path):
    """The inputs of a recipe."""
    folder = tmp_path / "work"
    write_lines(
        folder / "passages.jsonl",
        [{"text": f"This is passage number {i}: it tells how the bridge of {1700 + i} was built."} for i in range(40)],
    )
    write_lines(folder / "personas.jsonl", [{"persona": f"reader {i}"} for i in range(6)])
    write_lines(
        folder / "labeled.jsonl",
        [{"query": f"how do I {i}?", "positive": f"choose {i} in menu {i % 7}"} for i in range(30)],
    )
    write_lines(folder / "dev" / "corpus.jsonl", [{"_id": str(i), "text": f"held-out text {i * i}"} for i in range(9)])
    write_lines(folder / "dev" / "queries.jsonl", [{"_id": "q", "text": "what is 16?"}])
    (folder / "dev" / "qrels").mkdir()
    (folder / "dev" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t4\t1\n")
    return folder


def environment(**changes):
    """Variables for run.sh, with `pyqemb` on the path."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **changes}


@pytest.mark.slow
def test_the_whole_recipe(tmp_path, work, serve):
    recipes = Path(shutil.copytree(RECIPES, tmp_path / "recipes"))
    # A model without training gives every pair another cosine.
    for name, before, after in (
        ("synthesis.toml", "http://localhost:8000/v1", serve(answer).url),
        ("curation-stage2.toml", "min_sim = 0.7", "min_sim = -1.0"),
    ):
        text = (recipes / name).read_text()
        assert before in text
        (recipes / name).write_text(text.replace(before, after))
    base = write_tiny_folder(tmp_path / "base", hidden_size=1024, num_hidden_layers=1, max_position_embeddings=2048)
    command = ["bash", str(recipes / "run.sh"), str(recipes / "qwen3-embedding-0.6b"), str(work)]
    options = environment(BASE=str(base), SEEDS="0 1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, capture_output=True, text=True, env=options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (work / "exported" / "model.safetensors").exists()
    assert json.loads((work / "merged.json").read_text())["count"] == 1
    mined = [json.loads(line) for line in (work / "mined" / "labeled.jsonl").open()]
    assert len(mined) == 30
    assert sum(len(row.get("negatives", ())) for row in mined) > 30
    weights = [(work / "runs" / f"stage2-{seed}" / "final" / "model.safetensors").read_bytes() for seed in (0, 1)]
    assert weights[0] != weights[1]
    # Again: every step is complete.
    kept = {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")}
    again = subprocess.run(command, capture_output=True, text=True, env=options)
    assert again.returncode == 0, again.stderr
    assert not re.search("== (train|curate|mine|merge|export)", again.stdout)
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")} == kept


@pytest.mark.parametrize("recipe", SIZES)
def test_the_settings_fit_the_model(recipe):
    sizes = json.loads((SHAPES / f"{SIZES[recipe]}.json").read_text())
    for stage in (1, 2):
        config = load_config(RECIPES / recipe / f"stage{stage}.toml")
        assert config.stage == stage
        assert config.loss.matryoshka[0] == sizes["hidden_size"]
        assert 8 % config.parallel.shard == 0
    assert load_config(RECIPES / recipe / "stage1.toml").model.base == f"Qwen/{SIZES[recipe]}-Base"


def test_a_missing_input_is_named(work):
    (work / "labeled.jsonl").unlink()
    command = ["bash", str(RECIPES / "run.sh"), str(RECIPES / "qwen3-embedding-0.6b"), str(work)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert f"{work}/labeled.jsonl: missing" in done.stderr
    assert not (work / "synthetic").exists()


def test_a_call_without_arguments_prints_the_usage():
    done = subprocess.run(["bash", str(RECIPES / "run.sh")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "recipes/run.sh recipes/qwen3-embedding-0.6b WORK" in done.stdout
