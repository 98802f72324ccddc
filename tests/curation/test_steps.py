"""Each step against what its definition says, over streams longer than its windows."""

import json
import math

import numpy as np
import pytest

from pyqemb.curation.decontaminate import Decontaminate
from pyqemb.curation.dedup import Exact, Near, clusters, rows_of_band
from pyqemb.curation.ledger import Ledger
from pyqemb.curation.rank import Consistency, Rank
from pyqemb.curation.similarity import Similarity
from pyqemb.curation.spool import Seen, Spool
from pyqemb.curation.text import Language, Length
from pyqemb.data.example import Example, write_examples
from pyqemb.errors import ConfigError, DataError


class Circle:
    """Texts end in an angle in degrees; the score of two is the cosine between them."""

    def encode_query(self, texts, instruction=None):
        angles = np.radians([float(text.split()[-1]) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    encode_document = encode_query


def run(step, examples):
    ledger = Ledger(step.kind)
    kept = list(step.run(iter(examples), ledger))
    assert ledger.kept == len(kept)
    assert ledger.counts.total() == len(examples)
    return kept, dict(ledger.dropped)


def pairs(*degrees):
    return [Example(f"q{i} 0", f"d{i} {angle}") for i, angle in enumerate(degrees)]


def test_length():
    examples = [
        Example("a", "bb"),
        Example("  ", "bb"),
        Example("aaaa", "bb"),
        Example("aa", "b" * 9),
        Example("same", "same "),
    ]
    kept, dropped = run(Length(max_query=3, max_positive=5), examples)
    assert kept == examples[:1]
    assert dropped == {"query shorter than 1": 1, "query longer than 3": 2, "positive longer than 5": 1}
    assert run(Length(), [examples[4]])[1] == {"the positive is the query": 1}
    assert run(Length(allow_identical=True), [examples[4]])[0]


def test_language():
    english = "The library is open from nine until five on weekdays."
    german = "Die Bibliothek ist wochentags von neun bis siebzehn Uhr geöffnet."
    examples = [
        Example(english, english),
        Example(german, english),
        Example(english, german),
        Example("ja 12", english),
    ]
    kept, dropped = run(Language(languages=["en"]), examples)
    assert kept == [examples[0], examples[3]]
    assert dropped == {"query in de": 1, "positive in de": 1}
    assert len(run(Language(languages=["en"], sides=["positive"]), examples)[0]) == 3
    with pytest.raises(ConfigError, match="'xx' is not a language"):
        run(Language(languages=["en", "xx"]), examples)


def test_similarity_between_bounds():
    examples = pairs(0, 10, 60, 90)
    kept, dropped = run(Similarity(model=Circle(), min_sim=0.3, max_sim=0.99), examples)
    assert kept == examples[1:3]
    assert dropped == {"similarity below 0.3": 1, "similarity above 0.99": 1}
    assert run(Similarity(model=Circle()), examples)[0] == examples[:2]  # 0.7
    ledger = Ledger()
    assert len(list(Similarity(model=Circle()).run(pairs(0, 60, 90), ledger))) == 1
    assert "depends on the model" in ledger.notes["hint"]


def test_similarity_by_shares_of_the_data(tmp_path):
    examples = pairs(*np.random.default_rng(0).permutation(10_000) * 0.009)
    ledger = Ledger(work=tmp_path)
    kept = list(Similarity(model=Circle(), min_quantile=0.2, max_quantile=0.95).run(examples, ledger))
    assert abs(len(kept) - 7500) < 10
    assert ledger.notes["min_sim"] == pytest.approx(math.cos(math.radians(72)), abs=1e-3)
    places = {example: place for place, example in enumerate(examples)}
    assert sorted(map(places.get, kept)) == [places[e] for e in kept]
    assert not list(tmp_path.iterdir())


def slow_rank(example, texts):
    score = {text: math.cos(math.radians(float(text.split()[-1]) - float(example.query.split()[-1]))) for text in texts}
    return 1 + sum(x > score[example.positive] + 1e-5 for x in score.values())


def test_rank_against_a_slow_count():
    generator = np.random.default_rng(0)
    examples = [
        Example(f"q {generator.integers(0, 40)}", f"d {generator.integers(0, 90)}") for _ in range(300)
    ]  # several positives a query, several queries a positive
    texts = {e.positive for e in examples}
    ranks = [slow_rank(e, texts) for e in examples]
    kept, dropped = run(Rank(model=Circle(), min_rank=2, max_rank=9), examples)
    assert kept == [e for e, rank in zip(examples, ranks, strict=True) if 2 <= rank <= 9]
    assert dropped == {"rank below 2": sum(r < 2 for r in ranks), "rank above 9": sum(r > 9 for r in ranks)}
    kept, _ = run(Consistency(model=Circle(), top=3), examples)
    assert kept == [e for e, rank in zip(examples, ranks, strict=True) if rank <= 3]


def test_the_pool_may_hold_more_and_may_be_limited(tmp_path):
    write_examples(tmp_path / "more.jsonl", [Example("-", f"near\n{i} {i / 10}") for i in range(1, 6)])
    examples = [Example("q 0", "d 1"), Example("q 90", "d 91")]
    assert run(Rank(model=Circle(), max_rank=5), examples)[0] == examples
    further = Rank(model=Circle(), max_rank=5, pool=[tmp_path / "more.jsonl"])
    assert run(further, examples) == (examples[1:], {"rank above 5": 1})
    few = further.model_copy(update={"pool_size": 3})
    assert run(few, examples)[0] == run(few, examples)[0] == examples


def test_exact_keeps_the_first():
    examples = [Example("A b", "c"), Example("a  B!", "c."), Example("a b", "d"), Example("?", "!"), Example("!", "!")]
    kept, dropped = run(Exact(), examples)
    assert kept == [examples[0], examples[2], examples[3], examples[4]]
    assert dropped == {"pair there already": 1}
    assert run(Exact(on="query"), examples)[0] == [examples[0], examples[3], examples[4]]
    many = [Example(str(i % 9000), "p") for i in range(30_000)]
    assert run(Exact(), many)[0] == many[:9000]


def test_seen_tells_new_from_known():
    generator = np.random.default_rng(0)
    seen, known = Seen(), set()
    for size in (0, 1, 5, 1000, 3, 3000, 3000, 1, 0, 40):
        hashes = generator.integers(0, 4000, size).astype(np.uint64)
        new = []
        for value in hashes.tolist():
            new.append(value not in known)
            known.add(value)
        assert seen.add(hashes).tolist() == new
    assert len(seen._runs) <= 4


def noisy(words, generator, change):
    return " ".join(w if generator.random() > change else f"x{generator.integers(1 << 30)}" for w in words)


def test_near_finds_planted_copies(tmp_path):
    generator = np.random.default_rng(0)
    originals = [[f"w{n}" for n in generator.integers(0, 5000, 80)] for _ in range(300)]
    examples = [Example("q", " ".join(words)) for words in originals]
    copies = [Example("q", noisy(words, generator, 0.01)) for words in originals[:100]]
    others = [Example("q", noisy(words, generator, 0.5)) for words in originals[100:200]]
    kept, dropped = run(Near(on="positive", threshold=0.7), examples + copies + others)
    # A copy with c words changed shares at least (76 - 5c) / (76 + 5c) of its 5-grams: those with few are found.
    assert kept[:300] == examples
    assert set(others) <= set(kept)
    assert dropped["positive nearly there already"] >= 85
    assert run(Near(on="positive", threshold=1.0), examples + examples)[0] == examples


def test_texts_without_words_are_nobodys_copies():
    examples = [Example("q", mark) for mark in "!?.,"]
    assert run(Near(on="positive"), examples)[0] == examples


def test_clusters_follow_chains(tmp_path):
    signatures = np.arange(5 * 64, dtype=np.uint32).reshape(5, 64)
    signatures[1, :60], signatures[2, 4:] = signatures[0, :60], signatures[1, 4:]  # 0 ~ 1 ~ 2
    signatures[4] = signatures[3]
    signatures.tofile(tmp_path / "s")
    assert clusters(tmp_path / "s", 5, 64, 4, 0.9).tolist() == [0, 0, 0, 3, 3]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.95])
def test_bands_propose_what_is_at_the_threshold(threshold):
    rows = rows_of_band(128, threshold)
    bands = 128 // rows
    assert 1 - (1 - threshold**rows) ** bands >= 0.95
    assert rows == 128 or 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < 0.95


@pytest.fixture
def evaluation(tmp_path):
    def lines(name, rows):
        path = tmp_path / "eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    lines("queries.jsonl", [{"_id": "q1", "text": "How tall is the tower of 300"}])
    lines(
        "corpus.jsonl",
        [{"_id": n, "title": "", "text": f"{n} stands by the river and is very old 30{n}"} for n in "12"],
    )
    (tmp_path / "eval" / "qrels").mkdir()
    (tmp_path / "eval" / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\t2\t1\n")
    (tmp_path / "eval" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\t1\t1\n")
    return tmp_path / "eval"


def test_decontaminate_by_words(evaluation):
    judged, unjudged = (f"so {n} stands by the river and is very old 30{n} today" for n in "12")
    examples = [
        Example("a", judged),
        Example("b", unjudged),
        Example("how TALL is the tower of 300?", "c"),
        Example("d", "e"),
    ]
    kept, dropped = run(Decontaminate(folders=[evaluation], ngram=6), examples)
    reasons = {
        "positive shares 6 words, or all, with the evaluation": 2,
        "query shares 6 words, or all, with the evaluation": 1,
    }
    assert kept == [examples[3]]
    assert dropped == reasons
    kept, _ = run(Decontaminate(folders=[evaluation], ngram=10), examples)
    assert kept == [examples[1], examples[3]]
    kept, _ = run(Decontaminate(folders=[evaluation], ngram=6, documents=False), examples)
    assert kept == [examples[0], examples[1], examples[3]]


@pytest.mark.parametrize(
    "copy",
    [
        "the quick brown fox jumps over the lazy caf\u00e9",
        "THE  QUICK\nbrown fox jumps over the lazy cafe\u0301",
        "the qu\u200bick br\u00adown f\u2060ox jumps over the lazy caf\u00e9",
        "the&nbsp;quick brown&#160;fox ju&shy;mps over&amp;nbsp;the lazy caf&eacute;",
        "the \uff51\uff55\uff49\uff43\uff4b brown fox jumps over\u00a0the lazy cafe\ufe0f",
    ],
)
@pytest.mark.parametrize("swap", [False, True])
def test_decontaminate_sees_through_disguises(tmp_path, copy, swap):
    plain = "the quick brown fox jumps over the lazy caf\u00e9"
    held_out, own = (copy, plain) if swap else (plain, copy)
    write_examples(tmp_path / "dev.jsonl", [Example(held_out, "an answer")])
    step = Decontaminate(folders=[tmp_path / "dev.jsonl"], ngram=8)
    kept, dropped = run(step, [Example(own, "x"), Example("something else", "y")])
    assert [example.query for example in kept] == ["something else"]
    assert len(dropped) == 1


def test_decontaminate_by_meaning(evaluation):
    examples = [Example("about 301", "far 100"), Example("else 10", "close 302"), Example("else 10", "far 100")]
    kept, dropped = run(Decontaminate(folders=[evaluation], model=Circle(), max_similarity=0.99), examples)
    assert kept == examples[2:]
    assert dropped == {"query is nearly one of the evaluation": 1, "positive is nearly one of the evaluation": 1}


def test_decontaminate_names_what_is_missing(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        run(Decontaminate(folders=[tmp_path / "none"]), [])
    with pytest.raises(DataError, match=r"expected qrels/\*.tsv"):
        run(Decontaminate(folders=[tmp_path]), [])


def test_spooled_examples_come_back_whole(tmp_path):
    examples = [
        Example("q\n\u2028", "p", ("n", ""), "i", "t", 0.5, (1.0, 2.0, 3.0)),
        Example("", "😀é", query_embedding=(0.1,), positive_embedding=(0.2,)),
    ]  # fmt: skip
    spool = Spool(tmp_path)
    assert list(spool.fill(examples)) == list(spool) == examples
    assert len(spool) == 2
