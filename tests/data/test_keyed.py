"""The index of texts: keys are digests, and a later key replaces an earlier equal one."""

import hashlib

import numpy as np

from pyqemb.data.keyed import Keys, keys_of


def test_keys_are_digests_without_a_zero_at_the_end():
    texts = [str(number) for number in range(2000)]
    keys = keys_of(texts)
    assert keys.dtype == "S16"
    assert len(set(keys.tolist())) == 2000
    for text, key in zip(texts, keys.tolist(), strict=True):
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        assert len(key) == 16  # numpy strips zeros at the end
        assert key[:-1] == digest[:-1]
        assert key[-1] == digest[-1] | 1
    assert (keys_of([]).shape, keys_of([]).dtype) == ((0,), "S16")
    assert keys_of(["\ud800", "\u00e4"]).tolist() == [keys_of([text])[0] for text in ("\ud800", "\u00e4")]
    assert keys_of(["\u00e4"])[0][:-1] == hashlib.blake2b("\u00e4".encode(), digest_size=16).digest()[:-1]


def random_keys(count, seed):
    return np.random.default_rng(seed).integers(1, 255, (count, 16), dtype=np.uint8).view("S16").reshape(-1)


def test_rows_equal_those_of_a_dictionary():
    keys, truth, generator = Keys(), {}, np.random.default_rng(0)
    pool, count = random_keys(400, 1), 0
    for size in (0, 1, 3, 50, 2, 0, 120, 7, 1, 1, 64, 200):
        some = generator.choice(pool, size, replace=False)
        keys.add(some)
        truth |= {key: count + place for place, key in enumerate(some.tolist())}
        count += size
        assert keys.count == count
        found = keys.rows(pool)
        assert found.dtype == np.int64
        assert found.tolist() == [truth.get(key, -1) for key in pool.tolist()]


def test_the_runs_stay_few_and_sorted():
    keys = Keys()
    for number in range(200):
        keys.add(random_keys(1, number))
    sizes = [len(known) for known, _ in keys._runs]
    assert sum(sizes) == 200
    assert all(a > 2 * b for a, b in zip(sizes, sizes[1:], strict=False))  # so a search looks into few runs
    assert all((np.sort(known) == known).all() for known, _ in keys._runs)


def test_nothing_is_found_in_nothing():
    keys = Keys()
    assert keys.rows(keys_of("ab")).tolist() == [-1, -1]
    keys.add(keys_of([]))
    assert keys.count == 0
    assert not keys._runs
    assert keys.rows(keys_of([])).shape == (0,)
