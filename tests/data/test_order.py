from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modern_llm.data.order import epoch_order, permuted


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**62))
def test_permutation_is_a_bijection(n: int, seed: int) -> None:
    assert sorted(permuted(np.arange(n), n, seed).tolist()) == list(range(n))


@given(n=st.integers(1, 10**12), data=st.data())
def test_permutation_needs_no_table(n: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    places = permuted(positions, n, 3)
    assert places.min() >= 0 and places.max() < n
    assert [
        int(permuted(positions[i : i + 1], n, 3)[0]) for i in range(len(positions))
    ] == places.tolist()
    assert len(set(places.tolist())) == len(set(positions.tolist()))


def test_permutation_looks_random() -> None:
    n = 1000
    places = np.array([permuted(np.arange(n), n, seed) for seed in range(200)])
    means = places.mean(axis=0)  # each place is about uniform over seeds
    assert abs(means.mean() - 499.5) < 1e-6
    assert means.std() == pytest.approx(n / np.sqrt(12 * 200), rel=0.15)
    steps = Counter(np.diff(places[0]).tolist())
    assert max(steps.values()) <= 8  # no stride


@given(n=st.integers(1, 60), epochs=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_epoch_has_every_row_once(n: int, epochs: int, seed: int) -> None:
    rows = epoch_order(np.arange(n * epochs), n, seed).reshape(epochs, n)
    for epoch in rows:
        assert sorted(epoch.tolist()) == list(range(n))
    assert n < 10 or epochs < 2 or rows[0].tolist() != rows[1].tolist()
