from collections import Counter

import numpy as np
import pytest
import torch

from pyqemb.data.example import Example
from pyqemb.data.loader import Loader, build_batch
from pyqemb.data.token_cache import TokenCache
from pyqemb.errors import ConfigError
from pyqemb.testing.tiny import tiny_tokenizer

SETS = {
    "a": [Example(f"qa{i}", f"da{i}", tuple(f"n{i}{j}" for j in range(5))) for i in range(23)],
    "b": [Example(f"qb{i}", f"db{i}") for i in range(9)],
}


def test_each_batch_is_of_one_set_and_each_example_comes_once_a_pass():
    loader = Loader(SETS, 4, seed=1, num_negatives=2)
    seen = Counter()
    for step in range(loader.steps_per_epoch):
        batch = loader.batch(step)
        assert len({example.query[1] for example in batch}) == 1
        seen.update(example.query for example in batch)
        assert all(len(example.negatives) <= 2 for example in batch)
    assert set(seen) == {e.query for s in SETS.values() for e in s}
    assert max(seen.values()) - min(seen.values()) <= 1


def test_a_batch_depends_on_seed_and_step_alone():
    steps = [Loader(SETS, 4, seed=1, num_negatives=2).batch(step) for step in range(40)]
    loader = Loader(SETS, 4, seed=1, num_negatives=2)
    assert [loader.batch(step) for step in reversed(range(40))] == steps[::-1]
    assert [Loader(SETS, 4, seed=2, num_negatives=2).batch(step) for step in range(40)] != steps


def test_scores_are_drawn_with_their_negatives():
    examples = [
        Example(f"q{i}", "p", tuple(f"{n}" for n in range(9)), scores=(-1.0, *map(float, range(9)))) for i in range(8)
    ]
    for step in range(3):
        for example in Loader({"a": examples}, 4, num_negatives=3).batch(step):
            assert len(set(example.negatives)) == 3
            assert example.scores == (-1.0, *map(float, example.negatives))


def test_weights():
    loader = Loader(SETS, 4, weights={"a": 1.0, "b": 1.0})
    assert loader.batches["a"] == pytest.approx(loader.batches["b"], abs=1)


def test_equal_texts_are_one_document():
    examples = [Example("q0", "d", ("x",)), Example("q1", "d", ("y", "x")), Example("q2", "e"), Example("e", "q0")]
    batch = build_batch(examples, tiny_tokenizer())
    assert batch.texts == ["q0", "q1", "q2", "e", "d", "x", "y"]
    assert batch.query_text.tolist() == [0, 1, 2, 3]
    assert [batch.texts[i] for i in batch.document_text] == ["d", "x", "y", "e", "q0"]
    assert batch.positive.tolist() == [0, 0, 3, 4]
    assert batch.owner.tolist() == [0, 0, 1, 2, 3]
    assert batch.candidates.tolist() == [[0, 1, -1], [0, 2, 1], [3, -1, -1], [4, -1, -1]]
    own = build_batch(examples, tiny_tokenizer(), own_rows=True)
    assert own.texts == batch.texts
    assert [own.texts[i] for i in own.document_text] == ["d", "x", "d", "y", "x", "e", "q0"]
    assert own.positive.tolist() == [0, 2, 5, 6]
    assert own.owner.tolist() == [0, 0, 1, 1, 1, 2, 3]


def test_queries_have_their_instruction():
    tokenizer = tiny_tokenizer()
    batch = build_batch([Example("a query", "a document", instruction="Find")], tokenizer)
    packed = TokenCache(tokenizer).pack([batch.texts[i] for i in batch.query_text])
    assert torch.equal(packed.input_ids_T, torch.tensor(tokenizer.encode_queries(["a query"], "Find")[0]))


@pytest.mark.parametrize("count", [1, 2, 3, 8, 50])
def test_shares_hold_every_text_once_and_alike(count):
    generator = np.random.default_rng(0)
    examples = [Example("q" * int(n), "d" * int(n * 3 + i)) for i, n in enumerate(generator.integers(1, 60, 12))]
    batch = build_batch(examples, tiny_tokenizer())
    shares = batch.text_partition(count)
    assert len(shares) == count
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(batch.texts)))
    sizes = [sum(len(batch.texts[i]) for i in share) for share in shares]
    assert max(sizes) - min(sizes) <= max(map(len, batch.texts)) + len(batch.texts)


def test_bad_arguments():
    with pytest.raises(ConfigError, match="expected datasets that hold examples"):
        Loader({}, 4)
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        Loader(SETS, 0)
    with pytest.raises(ConfigError, match=r"missing: \['b'\]"):
        Loader(SETS, 4, weights={"a": 1.0})
