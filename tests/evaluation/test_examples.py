"""Measuring on examples: tables in memory, files and splits as tasks, several by name while training."""

import json

import numpy as np
import pytest

import pyqemb
from pyqemb import stage2
from pyqemb.data.example import Example, write_examples
from pyqemb.errors import ConfigError, DataError
from pyqemb.evaluation import Bitext, DevSets, Retrieval, Sts
from pyqemb.evaluation.tasks import load_task
from pyqemb.testing.tiny import write_tiny_folder

datasets, pd = map(pytest.importorskip, ("datasets", "pandas"))
PAIRS = [
    {"question": "a", "answer": "one", "negatives": ["two"], "instruction": None},
    {"question": "a", "answer": "three", "instruction": "Find"},
    {"question": "b", "answer": "one", "negatives": None},
    {"question": "a", "answer": "two", "instruction": "Find"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(write_tiny_folder(tmp_path_factory.mktemp("model") / "base", prefix=True, num_hidden_layers=1))


def texts(task):
    """{(query, instruction): relevant documents}, corpus."""
    found = {
        (task.queries[query], task.instructions.get(query)): {task.corpus[document] for document in judged}
        for query, judged in task.qrels.items()
    }
    return found, list(task.corpus.values())


def test_pairs_are_a_retrieval_task(tmp_path):
    expected = {("a", None): {"one"}, ("a", "Find"): {"three", "two"}, ("b", None): {"one"}}, ["one", "two", "three"]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(PAIRS[:1]), test=datasets.Dataset.from_list(PAIRS))
    both.save_to_disk(tmp_path / "saved")
    for source in (PAIRS, pd.DataFrame(PAIRS), tmp_path / "dev.jsonl", both, str(tmp_path / "saved")):
        assert texts(load_task(source)) == expected
    assert texts(load_task(both, "train"))[1] == ["one", "two"]
    task = load_task(PAIRS)
    assert not task.queries.keys() & task.corpus.keys()  # a query never gets the document with its own id
    assert load_task(task) is task


def test_graded_pairs_are_an_sts_task():
    rows = [{"sentence1": "a", "sentence2": "b", "score": 0.0}, {"sentence1": "c", "sentence2": "d", "score": 1.0}]
    assert load_task(rows) == Sts(["a", "c"], ["b", "d"], [0.0, 1.0])
    with pytest.raises(DataError, match="list: 1 of 2 rows have a score; expected one in all"):
        load_task([{"query": "q", "positive": "p"}, rows[0]])


class Hashes:
    """Equal texts have equal vectors."""

    def encode_query(self, texts, instruction=None, dim=None):
        draws = (np.random.default_rng(list(text.encode())).standard_normal(64) for text in texts)
        return np.stack([vector / np.linalg.norm(vector) for vector in draws]).astype(np.float32)

    def encode_document(self, texts, dim=None):
        return self.encode_query(texts)


def test_evaluate_in_memory(tmp_path):
    rows = [Example(f"text {i}", f"text {i if i % 2 else -i}") for i in range(1, 31)]
    write_examples(tmp_path / "dev.jsonl", rows)
    report = pyqemb.evaluate(Hashes(), rows, bootstrap=0)
    assert (report["task"], report["folder"], report["count"]) == ("retrieval", "list", 30)
    assert 0.5 <= report["metrics"]["accuracy@1"]["value"] < 0.6
    assert pyqemb.evaluate(Hashes(), tmp_path / "dev.jsonl", bootstrap=0)["metrics"] == report["metrics"]
    frame = pd.DataFrame({"a": [e.query for e in rows], "b": [e.positive for e in rows]})
    columns = {"query": "a", "positive": "b"}
    assert pyqemb.evaluate(Hashes(), frame, columns=columns, bootstrap=0)["metrics"] == report["metrics"]
    translations = Bitext([e.query for e in rows], [e.query for e in rows])
    assert pyqemb.evaluate(Hashes(), translations, bootstrap=0)["metrics"]["accuracy"]["value"] == 1


def test_several_datasets_by_name_while_training(base, tmp_path):
    rows = [{"query": f"q {i}", "positive": f"p {i}"} for i in range(8)]
    config = stage2(
        model={"base": base}, save={"dir": str(tmp_path / "run")}, eval={"metric": "faq/ndcg@10"},
        train={"global_batch_size": 4, "num_negatives": 0, "device": "cpu", "memory": "none"},
    )  # fmt: skip
    evaluate = {
        "faq": pd.DataFrame(rows),
        "titles": {"rows": PAIRS, "columns": {"positive": "answer", "ignore": "negatives"}, "instruction": "Find"},
        "task": Retrieval({"q": "a"}, {"d": "b", "e": "c"}, {"q": {"d": 1.0}}),
    }
    result = pyqemb.train(config, data=rows, evaluate=evaluate)
    assert result.best == tmp_path / "run" / "best"
    measured = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["eval"]
    names = ["faq", "titles", "task"]
    assert measured["ndcg@10"] == pytest.approx(sum(measured[f"{name}/ndcg@10"] for name in names) / 3)


def test_the_metrics_of_one_named_dataset_are_reported_once():
    def names(datasets, **section):
        evaluation = stage2(model={"base": "m"}, data=PAIRS, eval=section).eval
        found = DevSets(evaluation, datasets=datasets)
        assert tuple(found(Hashes())) == found.metric_names
        return found.metric_names

    plain = names(PAIRS)
    assert names({"faq": PAIRS}) == tuple(f"faq/{name}" for name in plain)
    assert names({"faq": PAIRS}, metric="mrr@10") == ("mrr@10", *(f"faq/{name}" for name in plain))
    assert names({"a": PAIRS, "b": PAIRS})[: len(plain)] == plain


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": PAIRS, "split": "test"}, r"'rows', 'split'; give the rows or the path itself: .*columns=\.\.\."),
        ({"query": ["a"], "positive": ["b"]}, r"'query', 'positive'; give a list with a dict for each row: .*\[\{"),
        ({"faq": PAIRS}, r"'faq'; give one dataset: pyqemb\.evaluate\(model, data\)"),
    ],
)
def test_a_dict_is_answered_with_the_call_that_was_meant(given, message):
    with pytest.raises(DataError, match=f"evaluate: expected a dataset, got a dict with the keys {message}"):
        pyqemb.evaluate(Hashes(), given)
    with pytest.raises(DataError, match="dict with the keys"):
        list(pyqemb.read_examples(given))


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({}, "evaluate: expected at least one dataset"),
        (
            {"a": {"rows": PAIRS, "colums": {}}},
            "'a': unknown key 'colums'; expected some of path, rows, split, columns",
        ),
        ({"a": {"rows": PAIRS, "path": "b"}}, "path and rows exclude each other"),
        ({"a": "nowhere"}, "nowhere: no such folder"),
        ({"faq": [{"title": "a", "body": "b"}]}, r"faq\[0\]: column 'query' is missing"),
    ],
)
def test_what_is_refused_before_training(evaluate, message, tmp_path):
    config = stage2(model={"base": "m"}, data=PAIRS, save={"dir": str(tmp_path / "run")})
    with pytest.raises((ConfigError, DataError), match=message):
        pyqemb.train(config, evaluate=evaluate)
    assert not (tmp_path / "run").exists()


def test_datasets_are_given_once(tmp_path):
    section = stage2(model={"base": "m"}, data=PAIRS, eval={"data": "dev"}).eval
    with pytest.raises(ConfigError, match=r"eval: has datasets, and evaluate=\.\.\. is given too"):
        DevSets(section, datasets={"a": PAIRS})
    with pytest.raises(ConfigError, match=r"evaluate: expected a function of the model; pyqemb\.train takes datasets"):
        pyqemb.training.train(stage2(model={"base": "m"}, data=PAIRS), evaluate={"a": PAIRS})


def test_a_reranker_is_measured_on_tables():
    from pyqemb.evaluation.reranking import measure_reranker, read_ranked_examples

    class Lengths:
        def score(self, pairs, instruction=None):
            return [len(document) for _, document in pairs]

    both = datasets.DatasetDict(
        train=datasets.Dataset.from_list([{"query": "q", "positive": "p"}]),
        test=datasets.Dataset.from_list([{"query": "q", "positive": "long", "negatives": ["n", "m"]}]),
    )
    assert measure_reranker(Lengths(), read_ranked_examples(both))["accuracy@1"].tolist() == [1.0]
    with pytest.raises(DataError, match="Dataset: no example has negatives"):
        read_ranked_examples(both["train"])
