import numpy as np
import pytest
import pytrec_eval
import scipy.stats

from pyqemb.evaluation import metrics


def random_rankings(seed=0):
    """Graded judgements, some of documents that were never returned, and distinct scores (trec_eval breaks ties its
    way).
    """
    generator = np.random.default_rng(seed)
    run, qrels = {}, {}
    for query in range(40):
        documents = [f"d{i}" for i in generator.permutation(60)[:30]]
        scores = generator.permutation(1000)[:30].astype(float)
        run[f"q{query}"] = dict(zip(documents, scores.tolist(), strict=True))
        judged = generator.permutation(60)[: generator.integers(1, 15)]
        qrels[f"q{query}"] = {f"d{i}": int(generator.integers(1, 4)) for i in judged}
    return run, qrels


def test_equal_to_trec_eval():
    run, qrels = random_rankings()
    names = {"ndcg_cut_10", "recall_10", "recip_rank", "recall_100"}
    truth = pytrec_eval.RelevanceEvaluator(qrels, names).evaluate(run)
    for query, scores in run.items():
        ranking = sorted(scores, key=scores.get, reverse=True)
        assert metrics.ndcg_at_k(ranking, qrels[query], 10) == pytest.approx(truth[query]["ndcg_cut_10"])
        assert metrics.recall_at_k(ranking, qrels[query], 10) == pytest.approx(truth[query]["recall_10"])
        assert metrics.recall_at_k(ranking, qrels[query], 100) == pytest.approx(truth[query]["recall_100"])
        assert metrics.mrr_at_k(ranking, qrels[query], 100) == pytest.approx(truth[query]["recip_rank"])


def test_correlations_equal_scipy_with_ties():
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 6, 200), generator.normal(size=200).round(1)
    assert metrics.spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert metrics.pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic)
    assert np.isnan(metrics.spearman(np.ones(5), np.arange(5)))
    assert [metrics.shown(x) for x in (0.5, np.nan)] == ["0.5000", "none"]


def test_edges():
    assert metrics.ndcg_at_k([], {"a": 1}) == 0
    assert metrics.accuracy_at_1([], {"a": 1}) == 0
    assert metrics.ndcg_at_k(["a"], {}) == 0
    assert metrics.recall_at_k(["a"], {}) == 0
    assert metrics.mrr_at_k(["a", "b"], {"b": 1}, 1) == 0
    assert metrics.mrr_at_k(["a", "b"], {"b": 1}, 2) == 0.5


def test_matching():
    assert metrics.matching_f1(np.array([0, 1, 2])) == 1
    assert metrics.matching_f1(np.array([0, 0, 0])) == pytest.approx(2 * 1 * (1 / 3) / (1 + 1 / 3))
    assert metrics.matching_f1(np.array([1, 0])) == 0
    assert metrics.matching_f1(np.array([0, 0, 2]), np.array([0, 0, 2])) == 1


def test_bootstrap_covers_the_mean_at_its_level():
    generator = np.random.default_rng(0)
    inside = 0
    for trial in range(100):
        interval = metrics.bootstrap_interval(generator.random(80), n=200, seed=trial)
        inside += interval.low <= 0.5 <= interval.high
        assert interval.low <= interval.value <= interval.high
    assert 85 <= inside <= 100


def test_bootstrap_is_seeded_and_may_be_off():
    values = np.arange(10) / 10
    assert metrics.bootstrap_interval(values, seed=3) == metrics.bootstrap_interval(values, seed=3)
    assert metrics.bootstrap_interval(values, n=0) == (pytest.approx(0.45),) * 3
