"""Ranks that start with different settings, versions or files: every rank names the rank and what differs."""

import json
import os
import subprocess
import sys

import pytest

import pyqemb
from pyqemb.testing.tiny import write_tiny_folder
from pyqemb.training import load_config, stage2
from pyqemb.training.agreement import model_files

# Each rank works in a folder of its own, as on machines that share no file system.
SCRIPT = """
import json, os, sys
import torch, pyqemb, pyqemb.training
from pyqemb.data.machine import exit_code_of
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
folder, cases = sys.argv[1], sys.argv[2:]
report = {}
for case in cases:
    os.chdir(f"{folder}/{case}/{rank}")
    overrides = ["train.learning_rate=0.001", "train.seed=5"] if case == "settings" and rank else []
    version = torch.__version__
    if case == "torch" and rank:
        torch.__version__ = "1.0"
    evaluate = (lambda model: {"score": 1.0}) if case == "evaluate" and rank == 0 else None
    try:
        if case == "elsewhere":
            overrides.append(f"save.dir={folder}/{case}/shared")
        config = pyqemb.training.load_config("run.json", overrides)
        resume = "run/checkpoints/step_00000002" if case == "elsewhere" else "auto"
        result = pyqemb.train(config, evaluate=evaluate, resume=resume)
        report[case] = result.steps, len(result.metrics)
    except Exception as error:
        report[case] = type(error).__name__, str(error), exit_code_of(error)
    torch.__version__ = version
with open(f"{folder}/rank{rank}.json", "w") as file:
    json.dump(report, file)
"""


def place(folder, case, base_seed=0, rows=8, word="d"):
    """The folder of a rank."""
    write_tiny_folder(folder / "base", seed=base_seed)
    lines = [{"query": f"q {i}", "positive": f"{word} {i}"} for i in range(rows)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = stage2(
        model={"base": "base"}, data=[{"path": "pairs.jsonl"}], save={"dir": "run"},
        train={
            "steps": 3, "schedule": "constant", "global_batch_size": 4, "num_negatives": 0, "device": "cpu",
            "rank_timeout": 30,
        },
    )  # fmt: skip
    (folder / "run.json").write_text(settings.model_dump_json())


CASES = {
    "same": [{}, {}],
    "settings": [{}, {}],
    "torch": [{}, {}],
    "evaluate": [{}, {}],
    "data": [{}, {"word": "e"}],
    "rows": [{}, {"rows": 9}],
    "model": [{}, {"base_seed": 1}],
    "missing": [{}, {}],
    "newer": [{}, {}],
    "elsewhere": [{}, {"word": "e"}],
    "continued": [{}, {}],
}
TRAINED = ("newer/1", "elsewhere/0", "elsewhere/1", "continued/0")  # hold a checkpoint


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each rank said in each case."""
    folder = tmp_path_factory.mktemp("agreement")
    for case, sides in CASES.items():
        for rank, side in enumerate(sides):
            (folder / case / str(rank)).mkdir(parents=True)
            place(folder / case / str(rank), case, **side)
    (folder / "missing" / "1" / "pairs.jsonl").unlink()
    home = os.getcwd()
    for name in TRAINED:
        os.chdir(folder / name)
        pyqemb.train(load_config("run.json", ["train.steps=2"]))
        os.chdir(home)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script),
            str(folder), *CASES,
        ],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[:3000]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            "settings",
            "rank 1 has train.learning_rate = 0.001, rank 0 has 1e-05; rank 1 has train.seed = 5, rank 0 has 0",
        ),
        ("torch", "rank 1 has torch = '1.0', rank 0 has"),
        ("evaluate", "rank 1 has evaluate = 'not given', rank 0 has 'given'"),
        ("data", "rank 1 has the digest of the data = "),
        ("rows", "rank 1 has the rows of 'pairs' = 9, rank 0 has 8"),
        ("model", "rank 1 has model.base: model.safetensors = "),
        ("elsewhere", "rank 1 has the checkpoint = 'step 2, digest "),
    ],
)
def test_every_rank_names_what_differs(reports, case, words):
    for report in reports:
        kind, message, code = report[case]
        assert (kind, code) == ("ConfigError", 2)
        assert words in message, message
        assert message.endswith("all ranks need the same configuration, files and versions")


def test_a_file_that_one_rank_misses_is_named_by_all(reports):
    first, second = (report["missing"] for report in reports)
    assert second[0] == "DataError"
    assert first[0] == "RankError"
    assert first[1] == f"rank 1 failed with DataError: {second[1]}"
    assert "pairs.jsonl" in second[1]
    assert first[2] == second[2] == 3


def test_equal_files_in_other_places_train(reports):
    assert [report["same"] for report in reports] == [[3, 3], [3, 3]]


def test_ranks_that_do_not_share_save_dir_receive_the_checkpoint_of_the_first(reports):
    assert [report["continued"] for report in reports] == [[3, 1], [3, 1]], "one step was left"
    for report in reports:
        kind, message, code = report["newer"]
        assert (kind, code) == ("ConfigError", 2)
        assert message.startswith("save.dir: rank 1 has a checkpoint of step 2, rank 0 has none, and they do not share")


def test_a_sample_of_a_large_file_tells_checkpoints_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(1_000_000))
        (tmp_path / name / "config.json").write_text("{}")
    assert model_files(tmp_path / "a") == model_files(tmp_path / "b")
    with (tmp_path / "b" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"1")
    assert model_files(tmp_path / "a") != model_files(tmp_path / "b")
    assert model_files(tmp_path / "a").keys() == {"config.json", "model.safetensors"}
