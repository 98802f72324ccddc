import json

import numpy as np
import pytest

import pyqemb
from pyqemb.cli import main
from pyqemb.curation import consistency, distinct, similarity
from pyqemb.curation.similarity import pair_scores
from pyqemb.data.example import Example, read_examples
from pyqemb.errors import ConfigError, DataError
from pyqemb.testing.tiny import TEXTS, tiny_embedder, write_tiny_folder


class Circle:
    """Texts are angles in degrees; the score of two is the cosine between them."""

    def __init__(self):
        self.encoded = []

    def encode_query(self, texts, instruction=None):
        self.encoded += texts
        angles = np.radians([float(text.split()[-1]) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    encode_document = encode_query


def negatives(examples, **options):
    options = {"max_positive_ratio": None, "k": 2, **options}
    return [example.negatives for example in pyqemb.mine(Circle(), examples, **options).examples]


CORPUS = ["d 5", "d 20", "d 40", "d 70", "d 110", "d 180"]


def test_nearest_first_without_the_positive():
    assert negatives([Example("q 0", "d 5")], corpus=CORPUS) == [("d 20", "d 40")]
    assert negatives([Example("q 0", "d 5")], corpus=CORPUS, skip_top=1) == [("d 40", "d 70")]


def test_all_positives_of_a_query_text_are_spared():
    examples = [Example("q 0", "d 5"), Example("q 0", "d 20"), Example("q 100", "d 110")]
    assert negatives(examples, corpus=CORPUS) == [("d 40", "d 70"), ("d 40", "d 70"), ("d 70", "d 40")]


def test_ceilings():
    example = [Example("q 0", "d 40")]  # the positive scores 0.766
    assert negatives(example, corpus=CORPUS, max_positive_ratio=0.95) == [("d 70", "d 110")]
    assert negatives(example, corpus=CORPUS, margin=0.7) == [("d 110", "d 180")]
    assert negatives(example, corpus=CORPUS, max_score=-0.5) == [("d 180",)]
    # A positive below zero: the limit lies below it, not above.
    assert negatives([Example("q 0", "d 110")], corpus=CORPUS, max_positive_ratio=0.95) == [("d 180",)]


def test_random_sampling_is_seeded_and_stays_within_depth():
    documents = [f"d {angle}" for angle in range(10, 100)]
    example = [Example("q 0", "d 5")]
    drawn = [negatives(example, corpus=documents, sampling="random", seed=s, depth=20, k=5)[0] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(float(text.split()[-1]) < 30 for texts in drawn for text in texts)


def test_each_text_is_embedded_once_and_the_report_counts():
    model = Circle()
    mined = pyqemb.mine(model, [Example("q 0", "d 5"), Example("q 0", "d 20"), Example("q 0", "d 5")], k=1)
    assert sorted(model.encoded) == ["d 20", "d 5", "q 0"]
    assert mined.report.rows == 3
    assert mined.report.documents == 2
    assert mined.report.short == 3


def test_filters_count_what_they_drop():
    examples = [Example("q 0", "d 5"), Example("q 0", "d 90"), Example("q 88", "d 5")]
    result = consistency(Circle(), examples, top=1)
    assert result.kept == [examples[0]]
    assert sum(result.dropped.values()) == 2
    result = similarity(Circle(), examples, min_sim=0.2, max_sim=0.99)
    assert result.kept == []
    assert set(result.dropped) == {"similarity below 0.2", "similarity above 0.99"}
    assert pair_scores(Circle(), examples) == pytest.approx(np.cos(np.radians([5, 90, 83])), abs=1e-6)
    result = distinct([*examples, examples[0]])
    assert result.kept == examples
    assert result.dropped == {"there already": 1}


def test_real_model_and_instructions():
    examples = [Example(text, other, instruction="Find") for text, other in zip(TEXTS[:4], TEXTS[4:8], strict=True)]
    mined = pyqemb.mine(tiny_embedder(), examples, k=2, max_positive_ratio=None)
    assert all(len(set(e.negatives)) == 2 and e.positive not in e.negatives for e in mined.examples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": 5, "depth": 4}, "depth must be at least k, 5, got 4"),
        ({"max_positive_ratio": 0}, "max_positive_ratio must be"),
        ({"skip_top": -1}, "skip_top must be at least 0, got -1"),
        ({"sampling": "best"}, "sampling must be"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ConfigError, match=message):
        pyqemb.mine(Circle(), [Example("q 0", "d 5")], **options)


def test_bad_data():
    with pytest.raises(DataError, match="no examples"):
        pyqemb.mine(Circle(), [])
    with pytest.raises(DataError, match="NaN or infinity for queries"):
        pyqemb.mine(Circle(), [Example("q nan", "d 5")])
    for odd in (
        lambda texts: np.ones((len(texts) - 1, 2)),
        lambda texts: np.ones(len(texts)),
        lambda texts: [["a"]] * len(texts),
    ):
        model = Circle()
        model.encode_document = odd
        with pytest.raises(
            DataError, match=r"the model gives an array of .* for 1 documents, expected .*\(1, features\)"
        ):
            pyqemb.mine(model, [Example("q 0", "d 5")])
    with pytest.raises(ConfigError, match="top must be"):
        consistency(Circle(), [Example("q 0", "d 5")], top=0)


def test_command_line(tmp_path, capsys):
    write_tiny_folder(tmp_path / "model")
    rows = [{"query": f"q {i}", "positive": f"document {i * i}"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        "mine",
        str(tmp_path / "model"),
        str(tmp_path / "pairs.jsonl"),
        "--k",
        "3",
        "--max-positive-ratio",
        "2",
    ]
    assert main([*arguments, "--out", str(tmp_path / "mined.jsonl")]) == 0
    assert all(len(example.negatives) == 3 for example in read_examples(tmp_path / "mined.jsonl"))
    assert "12 rows, 12 documents" in capsys.readouterr().out
    assert main([*arguments, "--out", str(tmp_path / "pairs.jsonl")]) == 2
    assert main([*arguments[:2], str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "x.jsonl")]) == 3


def test_a_margin_over_the_mean_of_the_positives():
    two = [Example("q 0", "d 10"), Example("q 0", "d 60")]  # scores 0.985 and 0.5, mean 0.742
    pool = ["d 5", "d 40", "d 45", "d 80"]
    assert negatives(two, corpus=pool, mean_margin=0.0) == [("d 45", "d 80")] * 2
    assert negatives(two, corpus=pool, mean_margin=0.03) == [("d 40", "d 45")] * 2


def test_softmax_sampling_prefers_what_scores_high():
    examples = [Example("q 0", "d 5")]
    drawn = [
        negatives(examples, corpus=CORPUS, k=1, sampling="softmax", sampling_temperature=0.2, seed=seed)[0][0]
        for seed in range(400)
    ]
    scores = np.cos(np.radians([20, 40, 70, 110, 180]))
    share = np.exp(scores / 0.2) / np.exp(scores / 0.2).sum()
    counts = [drawn.count(text) / 400 for text in CORPUS[1:]]
    np.testing.assert_allclose(counts, share, atol=0.1)
    assert drawn.count("d 20") > drawn.count("d 40") > drawn.count("d 70")
    with pytest.raises(ConfigError, match="sampling_temperature"):
        negatives(examples, corpus=CORPUS, sampling="softmax", sampling_temperature=0.0)
