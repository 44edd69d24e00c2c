"""Verdicts against Student's t written out: in closed form, or integrated."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest

from modern_llm.experiments.verdicts import (
    ALPHA,
    CORRECTED,
    TEST,
    compare_to,
    holm,
    mean_of,
    t_interval,
)

TWO_SIDED: dict[int, Callable[[float], float]] = {  # degrees of freedom -> P(|T| > t)
    1: lambda t: 1 - 2 * math.atan(t) / math.pi,
    2: lambda t: 1 - t / math.sqrt(2 + t * t),
    4: lambda t: 1 - 0.75 * (u := t / math.sqrt(4 + t * t)) * 2 * (1 - u * u / 3),
}
TAIL_975 = {  # the quantile that 97.5 % lie below
    1: math.tan(0.475 * math.pi),
    2: 0.95 * math.sqrt(2 / (1 - 0.95**2)),
    4: 2 * math.sqrt(math.cos(math.acos(r := math.sqrt(4 * 0.975 * 0.025)) / 3) / r - 1),
}


def two_sided_integrated(t: float, df: int, *, pieces: int = 200_000) -> float:
    """P(|T| > t) by Simpson's rule over the density from 0 to t."""
    x = np.linspace(0, t, pieces + 1)
    log_c = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    density = np.exp(log_c - (df + 1) / 2 * np.log1p(x * x / df))
    weights = np.ones(pieces + 1)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return float(1 - 2 * (weights @ density) * t / pieces / 3)


def by_seed(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values))


def paired_t(reference: list[float], values: list[float]) -> tuple[float, float, float]:
    """Mean difference, its standard error (n - 1 in the deviation), and |t|."""
    differences = np.subtract(values, reference)
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    return float(differences.mean()), float(error), float(abs(differences.mean()) / error)


SAMPLES = {
    1: ([3.0, 3.4], [2.9, 3.1]),
    2: ([3.00, 3.10, 3.25], [2.96, 3.07, 3.20]),
    4: ([3.00, 3.10, 3.25, 3.40, 3.50], [2.96, 3.07, 3.20, 3.37, 3.44]),
}


@pytest.mark.parametrize("df", SAMPLES)
def test_p_and_interval_are_those_of_the_closed_form(df: int) -> None:
    reference, values = SAMPLES[df]
    mean, error, t = paired_t(reference, values)

    (verdict,) = compare_to(by_seed(reference), [by_seed(values)], lower_is_better=True)

    assert verdict.p == pytest.approx(TWO_SIDED[df](t), rel=1e-9)
    assert verdict.difference == pytest.approx(mean, rel=1e-12)
    assert verdict.low == pytest.approx(mean - TAIL_975[df] * error, rel=1e-9)
    assert verdict.high == pytest.approx(mean + TAIL_975[df] * error, rel=1e-9)
    assert (verdict.n, verdict.test) == (df + 1, TEST)
    assert verdict.word == ("better" if TWO_SIDED[df](t) < ALPHA else "not distinguishable")


@pytest.mark.parametrize("df", [3, 7, 9])
def test_p_is_that_of_the_integrated_density(df: int) -> None:
    rng = np.random.default_rng(df)
    reference = rng.normal(3, 0.05, df + 1).tolist()
    values = (np.array(reference) + rng.normal(0.01, 0.01, df + 1)).tolist()
    t = paired_t(reference, values)[2]

    (verdict,) = compare_to(by_seed(reference), [by_seed(values)], lower_is_better=True)

    assert verdict.p == pytest.approx(two_sided_integrated(t, df), abs=1e-9)


def test_the_integration_agrees_with_the_closed_forms() -> None:
    for df, closed in TWO_SIDED.items():
        assert two_sided_integrated(2.5, df) == pytest.approx(closed(2.5), abs=1e-10)
        assert closed(TAIL_975[df]) == pytest.approx(0.05, abs=1e-12)


def test_pairs_count_and_not_two_groups() -> None:
    """Seeds that differ by much more than the arms do: only the pairs can tell the arms apart."""
    reference = [3.0, 3.5, 4.0, 4.5, 5.0]
    values = [
        value - shift for value, shift in zip(reference, [0.1, 0.11, 0.09, 0.1, 0.105], strict=True)
    ]

    (verdict,) = compare_to(by_seed(reference), [by_seed(values)], lower_is_better=True)

    assert verdict.word == "better" and verdict.p is not None and verdict.p < 1e-4


@pytest.mark.parametrize(
    ("shift", "lower_is_better", "word"),
    [
        (-0.1, True, "better"), (0.1, True, "worse"),
        (-0.1, False, "worse"), (0.1, False, "better"),
    ],
)  # fmt: skip
def test_signs(shift: float, lower_is_better: bool, word: str) -> None:
    reference = by_seed([3.0, 3.2, 3.1])
    values = {seed: value + shift + 0.001 * seed for seed, value in reference.items()}

    (verdict,) = compare_to(reference, [values], lower_is_better=lower_is_better)

    assert verdict.word == word
    assert verdict.difference == pytest.approx(shift + 0.001)
    assert verdict.low is not None and verdict.high is not None
    assert verdict.low < verdict.difference < verdict.high


def test_the_order_of_seeds_is_nothing_and_unshared_ones_are_left_out() -> None:
    reference = {0: 3.0, 1: 3.1, 2: 3.25, 9: 99.0}
    values = {7: -99.0, 2: 3.2, 0: 2.96, 1: 3.07}

    (shuffled,) = compare_to(reference, [values], lower_is_better=True)
    (plain,) = compare_to(
        {0: 3.0, 1: 3.1, 2: 3.25}, [{0: 2.96, 1: 3.07, 2: 3.2}], lower_is_better=True
    )

    assert shuffled == plain and plain.n == 3


def test_one_seed_has_a_difference_and_no_verdict() -> None:
    (verdict,) = compare_to({0: 3.0, 5: 1.0}, [{0: 2.0, 6: 1.0}], lower_is_better=True)

    assert verdict.word == "one seed: no verdict"
    assert (verdict.difference, verdict.p, verdict.low, verdict.high) == (-1.0, None, None, None)
    assert (verdict.n, verdict.test) == (1, "none")


def test_no_shared_seed() -> None:
    (verdict,) = compare_to({0: 3.0}, [{1: 2.0}], lower_is_better=True)

    assert verdict.word == "no shared seed: no verdict" and verdict.difference is None


def test_equal_values_are_not_distinguishable() -> None:
    values = by_seed([3.0, 3.1, 3.2])

    (verdict,) = compare_to(values, [dict(values)], lower_is_better=True)

    assert (verdict.word, verdict.p, verdict.difference) == ("not distinguishable", 1.0, 0.0)


def test_a_shift_that_is_constant_is_distinguished_without_warnings() -> None:
    """0.5 can be subtracted exactly; 0.1 leaves differences of the size of rounding."""
    for shift in (0.5, 0.1):
        reference = by_seed([3.0, 3.25, 3.5, 4.0])
        values = {seed: value + shift for seed, value in reference.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (verdict,) = compare_to(reference, [values], lower_is_better=True)
        assert verdict.word == "worse" and verdict.p is not None and verdict.p < 1e-9


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.4; times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.4; none falls again."""
    assert holm([0.02, 0.4, 0.01, 0.03]) == pytest.approx([0.06, 0.4, 0.04, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.003]) == [0.003]
    assert holm([]) == []


def test_several_comparisons_are_corrected_together() -> None:
    """Each p is about 0.006; of three, Holm's smallest is thrice that, above 1 %."""
    reference = by_seed([3.0, 3.1, 3.2, 3.3, 3.4])
    noise = [0.00, 0.01, -0.01, 0.012, -0.012]
    better = {seed: value - 0.0265 + noise[seed] for seed, value in reference.items()}

    (alone,) = compare_to(reference, [better], lower_is_better=True)
    three = compare_to(reference, [better] * 3, lower_is_better=True)

    assert alone.p is not None and 0.0034 < alone.p < ALPHA
    assert (alone.word, alone.test) == ("better", TEST)
    for verdict in three:
        assert verdict.p == pytest.approx(3 * alone.p)
        assert (verdict.word, verdict.test) == ("not distinguishable", CORRECTED)
        assert (verdict.low, verdict.high) == (alone.low, alone.high)


def test_an_arm_without_a_test_does_not_count_for_the_correction() -> None:
    reference = by_seed([3.0, 3.1, 3.2])
    better = {seed: value - 0.2 + 0.001 * seed for seed, value in reference.items()}

    tested, single = compare_to(reference, [better, {0: 2.0}], lower_is_better=True)

    assert (tested.word, tested.test) == ("better", TEST)
    assert single.word == "one seed: no verdict"


def test_the_interval_of_a_mean_has_the_sample_deviation() -> None:
    """Of 1, 2, 3: deviation 1 (over n - 1), so 2 -+ t(2) / sqrt(3)."""
    half = TAIL_975[2] / math.sqrt(3)

    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - half, 2 + half), rel=1e-9)
    mean = mean_of([1.0, 2.0, 3.0])
    assert mean is not None and (mean.value, mean.n) == (2.0, 3)
    assert t_interval([1.0]) == (None, None)
    single = mean_of([4.0])
    assert single is not None and (single.value, single.low, single.n) == (4.0, None, 1)
    assert mean_of([]) is None
