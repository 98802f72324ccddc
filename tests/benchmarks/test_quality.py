"""benchmarks/quality: its data, search, intervals and results file; and the pages that it makes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "quality"
PAGE = """.TH TAR 1
.SH NAME
tar \\- an archiving utility
.SH SYNOPSIS
\\fBtar\\fR [OPTIONS]
.SH DESCRIPTION
.\\" a comment
GNU \\fBtar\\fR saves many files
.B together
into a \\(lqsingle\\(rq tape or disk archive.
"""


@pytest.fixture
def quality(monkeypatch):
    """Imports a module of the folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    known = set(sys.modules)
    yield __import__
    for name in set(sys.modules) - known:
        if (FOLDER / f"{name}.py").exists():
            del sys.modules[name]


def test_a_manual_page(quality):
    summary, text = quality("manpages").page(PAGE)
    assert summary == "an archiving utility"
    assert text == "tar: GNU tar saves many files together into a 'single' tape or disk archive."
    assert quality("manpages").page(PAGE.replace("DESCRIPTION", "NOTES")) is None


def test_no_held_out_text_is_in_the_training_pairs(quality):
    task = quality("tasks").load("help", None)
    trained = {text for pair in task.train for text in (pair.query, pair.positive)}
    for held_out in (task.dev, task.test):
        assert not trained & {*held_out.queries.values(), *held_out.corpus.values()}
        assert all(held_out.qrels[query] for query in held_out.queries)
        assert {d for relevant in held_out.qrels.values() for d in relevant} <= held_out.corpus.keys()
    assert len(task.train) == quality("tasks").TRAIN
    assert not set(task.dev.queries.values()) & set(task.test.queries.values())


@pytest.mark.parametrize("name", ["packages", "nothing"])
def test_a_set_that_is_not_there_is_named(quality, tmp_path, name):
    tasks = quality("tasks")
    with pytest.raises(tasks.DataError, match=f"{name}: (needs --data FOLDER with debian_en|unknown set)"):
        tasks.load(name, tmp_path)


def test_intervals_cover_seeds_and_queries(quality):
    interval = quality("results").interval
    assert interval(np.full((3, 50), 0.25)) == pytest.approx((0.25, 0.25, 0.25))
    seeds = np.repeat([[0.0], [0.5], [1.0]], 50, axis=1)  # only seeds differ
    queries = np.repeat([np.arange(50) / 49], 3, axis=0)  # only queries differ
    for values, spread in ((seeds, 0.5 / 1.5**0.5 / 3**0.5), (queries, (1 / 12) ** 0.5 / 50**0.5)):
        at = interval(values)
        assert at.value == pytest.approx(0.5)
        assert at.high - at.low == pytest.approx(2 * 1.96 * spread, rel=0.3)


def test_a_finished_cell_is_not_run_again(quality, tmp_path):
    results = quality("results")
    first = results.Results(tmp_path / "results.json")
    first.content["environment"] = {"threads": 1}
    assert first.cell("a | 0", lambda: {"ndcg@10": 0.5, "values": [0.0, 1.0]})["ndcg@10"] == 0.5
    again = results.Results(tmp_path / "results.json")
    assert again.cell("a | 0", lambda: pytest.fail("run again")) == {"ndcg@10": 0.5, "values": [0.0, 1.0]}
    assert json.loads((tmp_path / "results.json").read_text())["environment"] == {"threads": 1}


def test_the_search_climbs_to_the_best_recipe(quality, monkeypatch):
    run, trainers = quality("run"), quality("trainers")
    asked = []

    def dev(self, trainer, recipe):
        asked.append(recipe)
        loss = {"cached": 1.0}.get(recipe.loss, 0.0)
        return loss - abs(np.log2(recipe.rate / 5e-4)) - abs(np.log2(recipe.batch / 1024)) / 2

    monkeypatch.setattr(run.Comparison, "_dev", dev)
    comparison = run.Comparison(None, run.STARTS["scratch"], None, None)
    best = comparison.search(trainers.SentenceTransformers())
    assert best == trainers.Recipe("cached", 512, 5e-4)  # 2048 is as far from 1024, and tried
    assert replace(best, batch=2048) in asked
    assert max(recipe.batch for recipe in asked) <= run.MAX_BATCH


def first_queries(task, count):
    """A task of some of the queries, with their documents only."""
    kept = list(task.queries)[:count]
    documents = {document for query in kept for document in task.qrels[query]}
    return replace(
        task,
        queries={query: task.queries[query] for query in kept},
        corpus={document: task.corpus[document] for document in sorted(documents)},
        qrels={query: task.qrels[query] for query in kept},
    )


@pytest.mark.deep
def test_ablations_run_and_are_shown(quality, monkeypatch, tmp_path):
    tasks, ablations, results, report = map(quality, ("tasks", "ablations", "results", "report"))
    monkeypatch.setattr(tasks, "TRAIN", 1000)
    monkeypatch.setattr(ablations, "TRAIN", {**ablations.TRAIN, "steps": 2, "global_batch_size": 16})
    monkeypatch.setattr(report, "PLOTS", tmp_path / "plots")
    found = results.Results(tmp_path / "results.json")
    found.content["environment"] = results.environment()
    lab = ablations.Lab(found, tmp_path / "work", tmp_path / "work" / "models" / "base-0" / "final")
    lab.tests = {name: first_queries(task, 20) for name, task in lab.tests.items()}
    lab.run(ablations.Variant(ablations.BASE), 0)
    for title in ("hard negatives", "titles", "pieces of the objective", "optimizer", "teacher"):
        for variant in ablations.experiments()[title]:
            if "steps" not in variant.train:
                lab.run(variant, 0)
    lab.merged(0)
    page = report.ablations(found)
    for name in ("1 hard negative", "titles: half titles after stage 1", "spread_out 1", "karcher of 5"):
        assert f"| {name} (1 seeds) | 0." in page
    assert (tmp_path / "plots" / "ablations-hard-negatives.svg").exists()


@pytest.mark.deep
def test_the_command_compares_the_trainers_and_resumes(tmp_path):
    out = tmp_path / "results.json"
    command = [
        sys.executable, str(FOLDER / "run.py"), "--seconds", "3", "--search-seconds", "1.5", "--sets", "help,packages",
        "--seeds", "2", "--work", str(tmp_path / "work"), "-o", str(out),
    ]  # fmt: skip
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parents[1]), "PATH": "", "HF_HUB_OFFLINE": "1"}
    for _ in range(2):
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "| final |" not in ran.stdout  # all cells were there
    assert "skipped: packages: needs --data FOLDER" in ran.stdout
    content = json.loads(out.read_text())
    assert content["skipped"] == ["packages"]
    for trainer in ("pyqemb", "sentence-transformers"):
        for seed in (0, 1):
            cell = content["cells"][f"help | scratch | {trainer} | final | {seed}"]
            assert len(cell["values"]) == 1000
            assert cell["seconds"] == pytest.approx(3, rel=0.7)
            assert 0 < cell["ndcg@10"] < 1


def test_the_page_holds_the_committed_results(quality, monkeypatch, tmp_path):
    report, results = quality("report"), quality("results")
    monkeypatch.setattr(report, "PLOTS", tmp_path)
    committed = results.Results(FOLDER.parent / "results" / "2026-11-30-quality.json")
    page = (report.DOCS / "dev" / "quality.md").read_text(encoding="utf-8")
    tables = page.partition(report.BEGIN)[2].partition(report.END)[0]
    assert tables.strip() == report.quality(committed).strip()
