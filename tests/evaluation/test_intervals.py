import math

import numpy as np
import pytest

from modern_llm.evaluation.intervals import (
    bootstrap,
    bootstrap_mean,
    crossed_means,
    share_interval,
    wilson,
)


def test_wilson_published_values() -> None:
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3 without continuity correction
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        interval = wilson(successes, n)
        assert interval is not None
        assert interval == pytest.approx((low, high), abs=5e-5)


def test_wilson_solves_its_equation() -> None:
    for successes, n in [(3, 10), (99, 100), (0.5, 7)]:
        ends = wilson(successes, n)
        assert ends is not None
        for p in ends:
            if 0 < p < 1:
                z = abs(successes / n - p) / math.sqrt(p * (1 - p) / n)
                assert z == pytest.approx(1.959964, abs=1e-5)
    assert wilson(0, 0) is None


def test_bootstrap_of_a_mean_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    low, high = bootstrap_mean(values) or (0, 0)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        counts = rng.integers(5, 50, size=80).astype(float)
        sums = counts * rng.normal(2.0, 1.0, size=80)
        ends = bootstrap(np.stack([sums, counts], 1), lambda s: s[:, 0] / s[:, 1], resamples=300)
        assert ends is not None
        covered += ends[0] <= 2.0 <= ends[1]
    assert 175 <= covered <= 199  # 95 % of 200 is 190


def test_bootstrap_is_seeded_and_needs_two_units() -> None:
    values = np.random.default_rng(5).random(12)
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values) != bootstrap_mean(values, seed=1)
    assert bootstrap_mean([1.0]) is None


def test_bootstrap_draws_in_chunks() -> None:
    columns = np.ones((9_000, 1))
    assert bootstrap(columns, lambda sums: sums[:, 0], resamples=1000) == (9000, 9000)


def test_non_finite_resamples_are_left_out() -> None:
    assert bootstrap(np.ones((5, 1)), lambda sums: np.full(len(sums), np.nan)) is None


def test_a_share_of_all_or_none_has_width() -> None:
    assert share_interval([0, 0, 0, 0]) == wilson(0, 4)
    assert share_interval([1, 1, 1]) == wilson(3, 3)
    low, high = share_interval([0, 1, 1, 0.5]) or (0, 0)
    assert 0 <= low < 0.625 < high <= 1
    assert share_interval([]) is None


def test_share_interval_of_units_of_different_weight() -> None:
    right, of = [1, 0, 3, 2, 0, 4], [2, 1, 3, 4, 2, 4]
    low, high = share_interval(right, of)
    assert low < 10 / 16 < high
    assert share_interval(np.multiply(right, 2), np.multiply(of, 2)) == (low, high)
    assert share_interval([3, 1], [3, 1]) == wilson(2, 2)  # a trial for each unit
    assert share_interval([0, 0], [3, 1]) == wilson(0, 2)
    assert share_interval([1], [2]) is None


def test_crossed_means_vary_as_both_factors_do() -> None:
    """Of values a_s + b_n the resampled mean has variance var(a) / S + var(b) / N."""
    rng = np.random.default_rng(0)
    a_S, b_N = rng.normal(size=5), 3 * rng.normal(size=40)
    means = crossed_means((a_S[:, None] + b_N)[:, :, None], resamples=20_000)[:, 0]
    assert means.mean() == pytest.approx(a_S.mean() + b_N.mean(), abs=0.02)
    assert means.var() == pytest.approx(a_S.var() / 5 + b_N.var() / 40, rel=0.03)
    alone = crossed_means(b_N[None, :, None], resamples=20_000)[:, 0]
    assert alone.var() == pytest.approx(b_N.var() / 40, rel=0.03), "one seed adds no spread"
