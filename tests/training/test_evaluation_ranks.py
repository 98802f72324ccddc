"""Evaluation by all ranks while training: each computes a part, and every result is that of one process."""

import json
import os
import subprocess
import sys

import pytest

import pyqemb
import pyqemb.training
from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import stage2
from pyqemb.training.state import checkpoints, verify

# Each rank trains with an `evaluate` that checks what it gets against a copy of the model, which encodes alone.
SCRIPT = """
import copy, json, os, sys
import numpy as np
import torch, pyqemb, pyqemb.training
from pyqemb.data.machine import exit_code_of
from pyqemb.evaluation import DevSets
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
TEXTS = [" ".join(str(number * each) for each in range(number % 13)) for number in range(40)]
PAIRS = [(text, TEXTS[-1 - number]) for number, text in enumerate(TEXTS)]
passes = []

def same(ours, theirs):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert ours.tobytes() == theirs.tobytes(), float(np.abs(ours - theirs).max())

def chunks(model, work):
    passes.clear()
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    result = work(model)
    hook.remove()
    return result, len(passes)

def compare(model, work):
    (ours, here), (theirs, alone) = chunks(model, work), chunks(copy.deepcopy(model), work)
    same(ours, theirs)
    assert here == max(len(range(rank, alone, size)), 1), (here, alone)

def embedder(model):
    for texts in (TEXTS, TEXTS[:1], TEXTS[7:10], [""]):
        for tokens in (30, 100000):
            compare(model, lambda each: each.encode(texts, tokens_per_chunk=tokens))
    compare(model, lambda each: each.encode_query(TEXTS, instruction="Find it.", dim=8, tokens_per_chunk=30))
    assert model.encode([]).shape == (0,)
    for ours, theirs in zip(model.encode(TEXTS[:5], output_value="token_embeddings"),
                            copy.deepcopy(model).encode(TEXTS[:5], output_value="token_embeddings"), strict=True):
        same(ours.numpy(), theirs.numpy())
    values = dev(model)
    assert values == dev(copy.deepcopy(model)) and "ndcg@10" in values
    return {"score": 0.25 + rank, **values}

def reranker(model):
    for pairs in (PAIRS, PAIRS[:1]):
        compare(model, lambda each: each.score(pairs, tokens_per_chunk=600))
    values = dev(model)
    assert values == dev(copy.deepcopy(model)) and "mrr@10" in values
    return {"score": 0.25 + rank, **values}

def fails_first(model):
    model.encode(TEXTS)
    if rank == 0:
        raise OSError(28, "No space left on device")
    model.encode(TEXTS)

def fails_last(model):
    if rank == size - 1:
        raise pyqemb.errors.DataError("pairs.jsonl:3: no text")
    try:
        model.encode(TEXTS)
    except pyqemb.errors.PyqembError:
        pass
    model.encode(TEXTS)

def first_alone(model):
    return {"score": float(model.encode(TEXTS).sum())} if rank == 0 else {}

def other_texts(model):
    return {"score": float(model.encode([*TEXTS[:39], f"of rank {rank}"]).sum())}

folder, report = sys.argv[1], {}
for name in sys.argv[2:]:
    config = pyqemb.training.load_config(f"{folder}/{name}.json")
    evaluate = globals()[name]
    if name in ("embedder", "reranker"):
        dev = DevSets(config.eval.model_copy(update={"data": f"{folder}/{config.task}"}), config.task)
    try:
        result = pyqemb.train(config, evaluate=evaluate)
        report[name] = [row["eval"] for row in result.metrics if "eval" in row], str(result.best)
    except Exception as error:
        report[name] = type(error).__name__, str(error), exit_code_of(error)
with open(f"{folder}/rank{rank}.json", "w") as file:
    json.dump(report, file)
"""
ERRORS = ("fails_first", "fails_last", "first_alone", "other_texts")


def write_material(folder):
    write_tiny_folder(folder / "base")
    write_tiny_folder(folder / "answering", max_position_embeddings=1024, prefix=True)
    rows = [{"query": f"q {i}", "positive": f"d {i}", "negatives": [f"d {i + 1}", "x"]} for i in range(16)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rerank").write_text("\n".join(map(json.dumps, rows)))
    (folder / "embedding" / "qrels").mkdir(parents=True)
    for name, key in (("queries", "query"), ("corpus", "positive")):
        lines = (json.dumps({"_id": f"{name[0]}{i}", "text": row[key]}) for i, row in enumerate(rows))
        (folder / "embedding" / f"{name}.jsonl").write_text("\n".join(lines))
    qrels = "".join(f"q{i}\tc{i}\t1\n" for i in range(len(rows)))
    (folder / "embedding" / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)


def write_config(folder, name, **sections):
    reranks = name == "reranker"
    settings = stage2(
        task="rerank" if reranks else "embedding", model={"base": str(folder / ("answering" if reranks else "base"))},
        data=[{"path": str(folder / "pairs.jsonl")}], save={"dir": str(folder / name)},
        train={"steps": 2, "global_batch_size": 8, "num_negatives": 2, "device": "cpu", "learning_rate": 1e-4},
        eval={"every": 1, "metric": "score", "instruction": "Find it."},
    )  # fmt: skip
    (folder / f"{name}.json").write_text(settings.model_dump_json())
    return settings


def launch(folder, count, *names):
    """The report of each rank."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", str(script),
            str(folder), *names,
        ],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[:3000]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(count)]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_all_ranks_evaluate_as_one_process_does(tmp_path, count):
    write_material(tmp_path)
    names = ("embedder", "reranker", *(ERRORS if count == 2 else ()))
    for name in names:
        write_config(tmp_path, name)
    reports = launch(tmp_path, count, *names)
    for name in ("embedder", "reranker"):
        values, best = reports[0][name]
        assert [value["score"] for value in values] == [0.25, 0.25], "those of the first rank"
        assert best == str(tmp_path / name / "best")
        assert all(report[name] == reports[0][name] for report in reports)
    if count == 2:
        check_errors(tmp_path, reports)


def check_errors(folder, reports):
    first, second = reports
    assert first["fails_first"] == ["OSError", "[Errno 28] No space left on device", 74]
    assert second["fails_first"] == ["RankError", "rank 0 failed with OSError: [Errno 28] No space left on device", 74]
    assert first["fails_last"] == ["RankError", "rank 1 failed with DataError: pairs.jsonl:3: no text", 3]
    assert second["fails_last"] == ["DataError", "pairs.jsonl:3: no text", 3]
    for report in reports:
        kind, message, code = report["first_alone"]
        assert (kind, code) == ("ConfigError", 2)
        assert "rank 0 encodes 40 texts, rank 1 does not encode anything more: every rank has to encode" in message
        kind, message, code = report["other_texts"]
        assert (kind, code) == ("ConfigError", 2)
        assert "rank 0 encodes 40 texts, rank 1 encodes 40 texts of other content" in message
    for name in ERRORS:
        assert [verify(each) for each in checkpoints(folder / name / "checkpoints")] == [1], name
    settings = pyqemb.training.load_config(folder / "fails_first.json")
    assert pyqemb.train(settings, evaluate=lambda model: {"score": 1.0}, resume="auto").steps == 2
