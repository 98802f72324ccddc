"""mteb itself on local tasks made of the help pages that ship: scores equal to those of sentence-transformers on the
same weights.
"""

import random

import pytest
import torch

from pyqemb import Embedder, Reranker
from pyqemb.cli import main
from pyqemb.demo.help_data import load_rows
from pyqemb.errors import ConfigError
from pyqemb.testing.tiny import tiny_embedder, write_tiny_folder

mteb, datasets = pytest.importorskip("mteb"), pytest.importorskip("datasets")
from mteb.abstasks import AbsTaskBitextMining, AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models.instruct_wrapper import InstructSentenceTransformerModel  # noqa: E402

ROWS = [row for row in load_rows("dev") if "de" in row and len(row["en"]) < 400][:120]
FACTS = dict(
    description="Help pages.", reference="https://example.org", dataset={"path": "local", "revision": "1"},
    category="t2t", eval_splits=["test"], eval_langs=["eng-Latn"], date=("2020-01-01", "2020-01-01"), dialect=[],
    domains=[], task_subtypes=[], license="mpl-2.0", annotations_creators="derived", modalities=["text"],
    sample_creation="found", bibtex_citation="",
)  # fmt: skip


def retrieval_data(ranked):
    queries = [{"id": f"q{i}", "text": row["title"] + " " + row["en"][:30]} for i, row in enumerate(ROWS[:40])]
    corpus = [{"id": f"d{i}", "text": row["en"], "title": row["title"]} for i, row in enumerate(ROWS)]
    draw = random.Random(0)
    top = {f"q{i}": [f"d{i}", *(f"d{j}" for j in draw.sample(range(40, len(ROWS)), 9))] for i in range(40)}
    return {
        "queries": datasets.Dataset.from_list(queries), "corpus": datasets.Dataset.from_list(corpus),
        "relevant_docs": {f"q{i}": {f"d{i}": 1} for i in range(40)}, "top_ranked": top if ranked else None,
    }  # fmt: skip


class LocalRetrieval(AbsTaskRetrieval):
    metadata = TaskMetadata(
        name="LocalRetrieval",
        type="Retrieval",
        main_score="ndcg_at_10",
        prompt={"query": "Find the help page"},
        **FACTS,
    )

    def load_data(self, **_):
        self.dataset, self.data_loaded = {"default": {"test": retrieval_data(False)}}, True


class LocalReranking(AbsTaskRetrieval):
    metadata = TaskMetadata(
        name="LocalReranking", type="Reranking", main_score="map_at_1000", prompt={"query": "Find the page"}, **FACTS
    )

    def load_data(self, **_):
        self.dataset, self.data_loaded = {"default": {"test": retrieval_data(True)}}, True


class LocalSTS(AbsTaskSTS):
    metadata = TaskMetadata(name="LocalSTS", type="STS", main_score="cosine_spearman", **FACTS)
    min_score, max_score = 0, 2

    def load_data(self, **_):
        pairs = [
            (row["en"], [row["en"][: len(row["en"]) // 2], row["de"], ROWS[-1]["en"]][i % 3], 2 - i % 3)
            for i, row in enumerate(ROWS)
        ]
        first, second, score = zip(*pairs, strict=True)
        self.dataset = datasets.DatasetDict(
            {"test": datasets.Dataset.from_dict({"sentence1": first, "sentence2": second, "score": score})}
        )
        self.data_loaded = True


class LocalBitext(AbsTaskBitextMining):
    metadata = TaskMetadata(
        name="LocalBitext", type="BitextMining", main_score="f1", prompt="Retrieve parallel sentences", **FACTS
    )

    def load_data(self, **_):
        columns = {"sentence1": [row["en"] for row in ROWS], "sentence2": [row["de"] for row in ROWS]}
        self.dataset, self.data_loaded = datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns)}), True


class LocalClassification(AbsTaskClassification):
    metadata = TaskMetadata(
        name="LocalClassification", type="Classification", main_score="accuracy", prompt="Which language?", **FACTS
    )

    def load_data(self, **_):
        def half(rows):
            texts = [row[language] for row in rows for language in ("en", "de")]
            return datasets.Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(len(texts))]})

        self.dataset, self.data_loaded = datasets.DatasetDict({"train": half(ROWS[:60]), "test": half(ROWS[60:])}), True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny_embedder()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.save_pretrained(tmp_path_factory.mktemp("mteb") / "model")


def template(instruction, prompt_type=None):
    return f"Instruct: {instruction}\nQuery:" if instruction and str(prompt_type) != "document" else ""


def score(model, task):
    return mteb.evaluate(model, [task()], cache=None, show_progress_bar=False).task_results[0].get_score()


@pytest.mark.parametrize(
    "task", [LocalRetrieval, LocalReranking, LocalSTS, LocalBitext, LocalClassification], ids=lambda t: t.__name__
)
def test_scores_are_those_of_sentence_transformers(folder, task):
    from pyqemb.interop.mteb import MtebEncoder

    instructions = {"LocalSTS": "Retrieve semantically similar text"}
    ours = score(MtebEncoder(Embedder.from_pretrained(folder, device="cpu"), instructions=instructions), task)
    theirs = InstructSentenceTransformerModel(
        str(folder),
        "main",
        device="cpu",
        instruction_template=template,
        apply_instruction_to_passages=False,
        prompts_dict=instructions,
    )
    assert ours == pytest.approx(score(theirs, task), abs=1e-4)
    assert ours > 0.05


def test_the_instruction_counts(folder):
    from pyqemb.interop.mteb import MtebEncoder

    model = Embedder.from_pretrained(folder, device="cpu")
    seen, real = [], model.encode

    def watched(texts, *args, **options):
        seen.append(options.get("prompt"))
        return real(texts, *args, **options)

    model.encode = watched
    score(MtebEncoder(model), LocalRetrieval)
    score(MtebEncoder(model, instructions={"LocalRetrieval": "Other"}, dim=8), LocalRetrieval)
    told = [prompt for prompt in seen if prompt]
    assert told == ["Instruct: Find the help page\nQuery:", "Instruct: Other\nQuery:"]


def test_rerankers(tmp_path):
    from pyqemb.interop.mteb import MtebReranker

    base = write_tiny_folder(tmp_path / "base", max_position_embeddings=1024, prefix=True)
    model = Reranker.from_pretrained(base, device="cpu")
    told = []

    class Overlap(Reranker):
        def score(self, pairs, instruction=None, tokens_per_chunk=None):
            told.extend(instruction)
            return super().score(pairs, instruction) * 0 + [len({*q.split()} & {*d.split()}) / 99 for q, d in pairs]

    model.__class__ = Overlap
    assert score(MtebReranker(model), LocalReranking) > 0.8
    assert set(told) == {"Find the page"}


def test_suites(folder, monkeypatch, capsys):
    from pyqemb.interop.mteb import run_suite

    model = Embedder.from_pretrained(folder, device="cpu")
    found = run_suite(model, "mine", tasks=[LocalSTS(), LocalBitext()])
    assert set(found) == {"LocalSTS", "LocalBitext"}
    with pytest.raises(ConfigError, match="mteb knows no benchmark or tasks 'NoSuchTask'"):
        run_suite(model, "NoSuchTask")
    monkeypatch.setattr("pyqemb.interop.mteb._tasks", lambda suite: [LocalSTS()])
    assert main(["evaluate", str(folder), "--suite", "mteb:LocalSTS"]) == 0
    assert "LocalSTS" in capsys.readouterr().out
    assert main(["evaluate", str(folder), "--suite", "beir:x"]) == 2
    assert main(["evaluate", str(folder)]) == 2
