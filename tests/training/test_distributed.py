"""Real processes: torchrun with 1, 2 and 4 of them gives one model; blocks that go round give what gathering gives."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pyqemb
from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import stage2
from pyqemb.training.config import TrainConfig


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    write_tiny_folder(folder / "base")
    generator = torch.Generator().manual_seed(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(40):
            words = [str(n) for n in torch.randint(0, 99, (2 + number % 9,), generator=generator).tolist()]
            negatives = [" ".join(sorted(words)), "7 7", f"{number} {number}"][: number % 4]
            row = {"query": " ".join(words), "positive": " ".join(words[::-1]), "negatives": negatives}
            file.write(json.dumps(row) + "\n")
    return folder


def config(
    folder,
    run,
    loss=None,
    data="pairs.jsonl",
    save=None,
    base="base",
    task="embedding",
    lora=None,
    teacher=None,
    guide=None,
    grouped=False,
    more_data=(),
    **train,
) -> TrainConfig:
    defaults = {
        "steps": 4, "global_batch_size": 12, "learning_rate": 1e-4, "epsilon": 1e-4, "num_negatives": 2,
        "tokens_per_chunk": 60, "device": "cpu",
    }  # fmt: skip
    return stage2(
        task=task, lora=lora, model={"base": str(folder / base)}, loss=loss or {},
        data=[{"path": str(folder / data), "group_positives": grouped}, *more_data],
        teacher=teacher and {"model": str(folder / teacher)}, guide=guide and {"model": str(folder / guide)},
        train={**defaults, **train}, save={"dir": str(folder / run), "every": 2, **(save or {})},
    )  # fmt: skip


# Each process trains; `poison` makes the loss of one of them NaN in the named steps.
SCRIPT = """
import json, os, sys
import torch, pyqemb
from pyqemb.training import trainer
torch.set_num_threads(1)
*paths, options = sys.argv[1:]
options = json.loads(options)
if len(paths) > 1:
    torch.distributed.init_process_group("gloo")  # a group of the script's own serves all runs
rank = int(os.environ["RANK"])
if options.get("script"):
    import runpy
    runpy.run_path(options["script"])
if options.get("poison"):
    from pyqemb.training.objectives.info_nce import InfoNCE
    real, calls = InfoNCE.loss, []
    def poisoned(self, *args):
        calls.append(None)
        part = real(self, *args)
        bad = rank == 1 and len(calls) in options["poison"]
        return part._replace(loss=part.loss * torch.nan) if bad else part
    InfoNCE.loss = poisoned
if options.get("stop_at"):
    import signal
    real_step = trainer.Run.train_step
    def stopping(self):
        if rank == 1 and self.step == options["stop_at"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(self)
    trainer.Run.train_step = stopping
for path in paths:
    try:
        pyqemb.train(path, resume=options.get("resume"))
    except pyqemb.errors.PyqembError as error:
        print(type(error).__name__, error)
"""


def run(count, folder, *runs: TrainConfig, **options):
    """The runs, one after the other, in `count` processes; what they printed."""
    script, paths = folder / "script.py", []
    script.write_text(SCRIPT)
    for settings in runs:
        paths.append(f"{settings.save.dir}.json")
        (folder / paths[-1]).write_text(settings.model_dump_json())
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", str(script),
            *paths, json.dumps(options),
        ],
        capture_output=True, text=True, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Exception in callback" not in done.stderr
    return done.stdout


def weights(folder, name):
    return load_file(folder / name / "final" / "model.safetensors")


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert float((a[name] - b[name]).abs().max()) < 1e-6, name


def metrics(folder, name):
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def alone(workplace):
    pyqemb.train(config(workplace, "alone"))
    before = load_file(workplace / "base" / "model.safetensors")
    after = weights(workplace, "alone")
    assert max(float((after[name] - before[name]).abs().max()) for name in after) > 1e-4, "it has learned nothing"
    return after


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_train_what_one_does(workplace, alone, count):
    run(count, workplace, config(workplace, f"gather{count}"))
    assert_same(weights(workplace, f"gather{count}"), alone)
    for a, b in zip(*(metrics(workplace, name) for name in (f"gather{count}", "alone")), strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["texts"] == b["texts"]
        assert all(
            a[key] == pytest.approx(b[key], rel=1e-4) for key in ("loss", "positive", "negative", "masked", "grad_norm")
        )


def test_a_ring_trains_the_same(workplace, alone):
    pyqemb.train(config(workplace, "ring1", documents="ring"))
    run(3, workplace, config(workplace, "ring3", documents="ring"))
    for name in ("ring1", "ring3"):
        assert_same(weights(workplace, name), alone)
        for a, b in zip(metrics(workplace, name), metrics(workplace, "alone"), strict=True):
            assert all(a[key] == pytest.approx(b[key], rel=1e-4) for key in ("loss", "positive", "negative"))


OBJECTIVES = {
    "own": dict(loss={"preset": "classification"}, data="wrong.jsonl"),
    "quantized": dict(loss={"precisions": ["float32", "int8", "binary"], "spread_out": 1.0}),
    "prefixes": dict(loss={"matryoshka": [32, 8], "softmax": "split", "focal": 0.5, "learn_temperature": True}),
    "several sweeps": dict(loss={"preset": "gte", "tau_plus": 0.01, "temperature": 0.1, "learn_temperature": True}),
    "few": dict(data="one.jsonl"),  # more processes than texts
}


def test_other_losses_and_batches(workplace):
    rows = [json.loads(line) for line in (workplace / "pairs.jsonl").open()]
    (workplace / "wrong.jsonl").write_text("\n".join(json.dumps(row) for row in rows if row["negatives"]))
    rows = [{**row, "query": rows[number // 3]["query"]} for number, row in enumerate(rows)]
    (workplace / "grouped.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (workplace / "one.jsonl").write_text('{"query": "a", "positive": "b c"}\n')
    runs = [
        config(workplace, f"{name}_{documents}", documents=documents, **options)
        for name, options in OBJECTIVES.items()
        for documents in ("gather", "ring")
    ]
    write_tiny_folder(workplace / "teacher", seed=5, hidden_size=48)
    write_tiny_folder(workplace / "answering", max_position_embeddings=1024, prefix=True)
    without_teacher = {"path": str(workplace / "pairs.jsonl"), "name": "again", "teacher_weight": 0.0}
    others = {
        "rerank": dict(task="rerank", base="answering", tokens_per_chunk=2000),
        "lora": dict(lora={"rank": 2}),
        "grouped": dict(data="grouped.jsonl", grouped=True, global_batch_size=5),
        "teacher": dict(teacher="teacher", documents="ring", more_data=[without_teacher], global_batch_size=20),
        "guided": dict(guide="teacher", loss={"matryoshka": [32, 8], "precisions": ["float32", "binary"]}),
        "lora_rerank": dict(task="rerank", base="answering", lora={"rank": 2}, tokens_per_chunk=2000),
    }
    run(3, workplace, *runs, *(config(workplace, f"{name}_3", **options) for name, options in others.items()))
    for name, options in others.items():
        pyqemb.train(config(workplace, f"{name}_alone", **options))
        assert_same(weights(workplace, f"{name}_3"), weights(workplace, f"{name}_alone"))
    with_teacher = {row["dataset"]: "teacher" in row for row in metrics(workplace, "teacher_3")}
    assert with_teacher == {"pairs": True, "again": False}
    for name, options in OBJECTIVES.items():
        pyqemb.train(config(workplace, f"{name}_alone", **options))
        for documents in ("gather", "ring"):
            assert_same(weights(workplace, f"{name}_{documents}"), weights(workplace, f"{name}_alone"))


def test_a_bad_step_of_one_process_is_skipped_by_all(workplace):
    run(2, workplace, config(workplace, "poisoned", steps=5), poison=[2, 3])
    rows = metrics(workplace, "poisoned")
    assert [row.get("skipped", False) for row in rows] == [False, True, True, False, False]
    assert len(rows[1]["rows"]) == 12
    assert rows[1]["loss"] is None
    assert all(torch.isfinite(x).all() for x in weights(workplace, "poisoned").values())
    said = run(2, workplace, config(workplace, "poisoned_for_good", steps=5, max_bad_steps=2), poison=[3, 4])
    assert said.count("stopped after 2 steps in a row that were not finite") == 2
    kept = workplace / "poisoned_for_good" / "checkpoints"
    assert [path.name for path in kept.iterdir()] == ["step_00000002"]


def test_all_stop_with_one_and_continue(workplace, alone):
    said = run(2, workplace, config(workplace, "stopped"), stop_at=1)
    assert said.count("Interrupted stopped by") == 2
    assert [path.name for path in (workplace / "stopped" / "checkpoints").iterdir()] == ["step_00000002"]
    run(2, workplace, config(workplace, "stopped"), resume="auto")
    assert_same(weights(workplace, "stopped"), alone)


def test_an_objective_of_a_script_trains_alike_on_several_ranks(workplace):
    """The example of docs/how-to/objective.md."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "objective.md").read_text()
    script = workplace / "sigmoid.py"
    script.write_text(page.split('```python title="sigmoid.py"\n')[1].split("```")[0])
    runpy.run_path(str(script))
    loss = {"objective": "sigmoid", "objectives": {"sigmoid": {"bias": -5.0}}, "temperature": 0.1}
    pyqemb.train(config(workplace, "sigmoid_1", loss))
    run(2, workplace, config(workplace, "sigmoid_2", loss), script=str(script))
    assert_same(weights(workplace, "sigmoid_1"), weights(workplace, "sigmoid_2"))
    one, two = (metrics(workplace, f"sigmoid_{count}") for count in (1, 2))
    assert [row["accuracy"] for row in one] == [row["accuracy"] for row in two]
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=1e-5)
