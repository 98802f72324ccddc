import pytest

from pyqemb.data.example import Example
from pyqemb.data.tokenizer import END_TOKEN
from pyqemb.demo.bm25 import bm25_ranking, words
from pyqemb.demo.help_data import LANGUAGES, help_material, load_rows, overlaps
from pyqemb.demo.material import halves, neighbours, untouched
from pyqemb.demo.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def material():
    return help_material()


def test_the_shipped_data(material):
    rows = {split: load_rows(split) for split in ("train", "dev")}
    assert (len(rows["train"]), len(rows["dev"])) == (17684, 1495)
    assert overlaps(rows["train"], rows["dev"])["pages on both sides"] == 0
    assert 80_000 < len(material.weak) < 110_000
    assert [len(corpus) for corpus in material.corpora.values()] == [1495, 19179]
    assert set(material.groups) == set(LANGUAGES)


def test_no_held_out_text_is_trained_on(material):
    held_out = {question.text for question in material.questions} | {d.text for d in material.corpora["held-out pages"]}
    titles = {row["title"] for row in load_rows("train")}
    trained = {text for pair in (*material.weak, *material.supervised) for text in (pair.query, pair.positive)}
    assert not (trained - titles) & (held_out - titles)
    assert not set(material.texts) & {d.text for d in material.corpora["held-out pages"]}


def test_every_question_has_an_answer_in_both_corpora(material):
    for corpus in material.corpora.values():
        texts = {document.text for document in corpus}
        assert all(question.answers & texts for question in material.questions)


def test_weak_pairs():
    (pair,) = halves(["First comes this clause, and then that one."])
    assert pair.query + " " + pair.positive == "First comes this clause, and then that one."
    assert not list(halves(["short"]))
    page = ["a", "b", "c", "a"]
    assert {x for pair in neighbours([page], seed=0) for x in (pair.query, pair.positive)} == {"a", "b", "c"}
    assert untouched([Example("a", "b"), Example("c", "d")], {"d"}) == [Example("a", "b")]


def test_tokenizer_ends_every_text():
    tokenizer = train_tokenizer(["Drucken Sie ein Dokument", "\u5370\u5237"] * 20, vocab_size=300)
    ids = tokenizer.encode("Wie?").ids
    assert ids[-1] == tokenizer.token_to_id(END_TOKEN)
    assert ids.count(ids[-1]) == 1
    assert tokenizer.decode(tokenizer.encode("unseen \U0001f600").ids) == "unseen \U0001f600"


def test_bm25():
    assert words("Print THE-page \u5370\u5237\u673a") == ["print", "the", "page", "\u5370\u5237", "\u5237\u673a"]
    found = bm25_ranking(["red apple", "nothing"], ["green pear", "red apple pie", "apple"], 2)
    assert found.tolist() == [[1, 2], [-1, -1]]
    assert bm25_ranking([], ["a"], 3).shape == (0, 1)
