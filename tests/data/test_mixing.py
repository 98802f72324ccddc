"""Shares under caps against a slow truth, orders, and what a loader draws."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqemb.data import loader as loader_module
from pyqemb.data.example import Example
from pyqemb.data.loader import Loader
from pyqemb.data.mixing import caps_of_epochs, lines, sampling_weights, table
from pyqemb.data.order import Order
from pyqemb.errors import ConfigError

ROWS = {"a": 1000, "b": 100, "c": 10}


def slow_shares(mass, caps):
    """min(cap, level * mass) adds up to 1: the level by bisection."""
    low, high = 0.0, 1e9
    for _ in range(200):
        level = (low + high) / 2
        total = sum(min(caps.get(n, np.inf), level * m) for n, m in mass.items())
        low, high = (level, high) if total < 1 else (low, level)
    return {n: min(caps.get(n, np.inf), high * m) for n, m in mass.items()}


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from("abcdef"), st.tuples(st.integers(1, 10**6), st.none() | st.floats(0.01, 1)), min_size=1
    ),
    st.floats(0, 1.5),
)
def test_shares_equal_a_slow_truth(sets, alpha):
    rows = {name: count for name, (count, _) in sets.items()}
    caps = {name: cap for name, (_, cap) in sets.items() if cap is not None}
    if len(caps) == len(rows) and sum(caps.values()) < 1 - 1e-9:
        with pytest.raises(ConfigError, match=r"leave .* of the steps to no dataset"):
            sampling_weights(rows, alpha=alpha, max_share=caps)
        return
    found = sampling_weights(rows, alpha=alpha, max_share=caps)
    assert sum(found.values()) == pytest.approx(1)
    truth = slow_shares({name: count**alpha for name, count in rows.items()}, caps)
    assert found == pytest.approx(truth, abs=1e-6)


def test_alpha_weights_and_caps():
    assert sampling_weights(ROWS) == pytest.approx({"a": 1000 / 1110, "b": 100 / 1110, "c": 10 / 1110})
    assert sampling_weights(ROWS, alpha=0) == pytest.approx(dict.fromkeys("abc", 1 / 3))
    assert sampling_weights(ROWS, weights={"a": 1, "b": 2, "c": 1}) == pytest.approx({"a": 0.25, "b": 0.5, "c": 0.25})
    assert sampling_weights(ROWS, max_share={"a": 0.5}) == pytest.approx(
        {"a": 0.5, "b": 0.5 * 100 / 110, "c": 0.5 * 10 / 110}
    )
    # What the first cap cuts off lifts the second set over its own.
    assert sampling_weights(ROWS, max_share={"a": 0.5, "b": 0.3}) == pytest.approx({"a": 0.5, "b": 0.3, "c": 0.2})
    assert caps_of_epochs(ROWS, {"a": 10, "b": 10, "c": 5}, {"c": 2.0}, 40) == {"c": 0.1}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_expected_epochs_are_what_is_drawn(alpha):
    sets = {name: [Example(f"{name}{i}", "p") for i in range(count)] for name, count in ROWS.items()}
    loader = Loader(sets, 16, seed=3, alpha=alpha, max_share={"a": 0.7})
    steps = 2 * loader.steps_per_epoch
    drawn = Counter(example.query[0] for step in range(steps) for example in loader.batch(step))
    for row in table(ROWS, loader.batches, loader.batch_sizes, steps):
        assert drawn[row.name] / row.rows == pytest.approx(row.epochs)
        assert row.share <= 0.72 or row.name != "a"
    text = lines(table(ROWS, loader.batches, loader.batch_sizes, steps))
    assert len(text) == 4
    assert text[1].split()[:2] == ["a", "1,000"]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 1000, 65_536, 65_537])
def test_an_order_holds_every_row_once(count):
    order = Order(count, np.random.default_rng(count))
    assert np.array_equal(np.sort(order(np.arange(count))), np.arange(count))


def test_orders_are_drawn_evenly():
    places = np.stack([Order(10, np.random.default_rng(seed))(np.arange(10)) for seed in range(4000)])
    counts = np.array([[(places[:, i] == j).sum() for j in range(10)] for i in range(10)])
    assert abs(counts - 400).max() < 6 * 20  # six standard deviations
    following = (np.diff(Order(1000, np.random.default_rng(0))(np.arange(1000))) == 1).sum()
    assert following < 10


def test_a_large_set_is_shuffled_without_memory(monkeypatch):
    monkeypatch.setattr(loader_module, "_LARGE", 50)
    sets = {"a": [Example(f"{i}", "p") for i in range(101)]}
    loader, again = (Loader(sets, 10, seed=1) for _ in "ab")
    rows = [row for step in range(21) for row in loader.rows(step)]
    assert sorted(rows[:101]) == sorted(rows[101:202]) == list(range(101))
    assert rows[:101] != rows[101:202]
    assert again.rows(17) == loader.rows(17)
    assert isinstance(again._pass("a", 1), Order)
