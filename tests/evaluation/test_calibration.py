import itertools

import numpy as np
import pytest

from modern_llm.evaluation.calibration import (
    auroc,
    auroc_score,
    auroc_within_score,
    ece_score,
    reliability,
)
from modern_llm.evaluation.intervals import wilson
from modern_llm.evaluation.scores import NotEvaluated, Score


def pairwise_auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    right, wrong = scores[labels], scores[~labels]
    won = sum(1.0 if r > w else 0.5 if r == w else 0.0 for r, w in itertools.product(right, wrong))
    return won / (len(right) * len(wrong))


@pytest.mark.parametrize("levels", [3, 1000])
def test_auroc_counts_pairs(levels: int) -> None:
    rng = np.random.default_rng(levels)
    for _ in range(20):
        scores = rng.integers(0, levels, 30) / levels
        labels = rng.random(30) < 0.4
        if labels.any() and not labels.all():
            assert auroc(scores, labels) == pytest.approx(pairwise_auroc(scores, labels), abs=1e-12)


def test_auroc_ends() -> None:
    assert auroc([0.1, 0.2, 0.3], [False, False, True]) == 1.0
    assert auroc([0.3, 0.2, 0.1], [False, False, True]) == 0.0
    assert auroc([0.5, 0.5], [False, True]) == 0.5
    assert auroc([0.5, 0.6], [True, True]) is None
    assert auroc([], []) is None


def test_auroc_interval_draws_problems_not_answers() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(300) < 0.5
    scores = np.clip(rng.normal(np.where(labels, 0.6, 0.4), 0.2), 0, 1)
    apart = auroc_score(scores, labels, np.arange(300), key="x")
    copies = auroc_score(
        np.repeat(scores, 4), np.repeat(labels, 4), np.repeat(np.arange(300), 4), key="x"
    )
    assert isinstance(apart, Score) and isinstance(copies, Score)
    assert apart.value == pytest.approx(copies.value)
    assert apart.ci95 == pytest.approx(copies.ci95)  # four equal answers say no more than one
    assert copies.n == 1200


def test_auroc_not_evaluable() -> None:
    for labels, why in [([True, True], "all 2 answers are right"), ([], "there are no answers")]:
        result = auroc_score([0.5] * len(labels), labels, range(len(labels)), key="x")
        assert isinstance(result, NotEvaluated)
        assert result.why == why


def test_auroc_within_problems_does_not_see_which_problems_are_easy() -> None:
    labels = [1, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    groups = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]  # the last has no wrong answer
    by_problem = [0.9] * 4 + [0.1] * 4 + [0.5] * 2
    result = auroc_within_score(by_problem, labels, groups, key="x")
    assert isinstance(result, Score)
    assert result.value == 0.5
    assert result.n == 2
    assert auroc(by_problem, labels) > 0.7
    ranked = [0.3, 0.2, 0.4, 0.1, 0.9, 0.7, 0.5, 0.8, 0.0, 0.0]  # 3 of 3 pairs, then 2 of 3
    result = auroc_within_score(ranked, labels, groups, key="x")
    assert isinstance(result, Score)
    assert result.value == pytest.approx((1 + 2 / 3) / 2)
    missing = auroc_within_score([0.1, 0.2], [1, 0], [0, 1], key="x")
    assert isinstance(missing, NotEvaluated)
    assert "no problem has right and wrong" in missing.why


def test_ece_by_hand() -> None:
    scores = [0.95, 0.95, 0.05, 1.0, 0.55]
    labels = [True, False, False, True, True]
    # bin 9: accuracy 2/3, confidence 2.9/3; bin 0: 0 against 0.05; bin 5: 1 against 0.55
    expected = (abs(2 - 2.9) + 0.05 + 0.45) / 5
    result = ece_score(scores, labels, range(5), key="x")
    assert isinstance(result, Score)
    assert result.value == pytest.approx(expected)
    assert isinstance(ece_score([], [], [], key="x"), NotEvaluated)


def test_ece_of_calibrated_scores_is_small() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(20_000)
    labels = rng.random(20_000) < scores
    result = ece_score(scores, labels, range(20_000), key="x")
    assert isinstance(result, Score)
    assert result.value < 0.02


def test_reliability() -> None:
    labels = [False, True, True, True]
    bins = reliability([0.0, 0.05, 0.1, 1.0], labels, range(4), n_bins=10)
    assert [b.n for b in bins] == [2, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert bins[0].accuracy == 0.5
    assert bins[0].mean_score == pytest.approx(0.025)
    assert bins[5].accuracy is None and bins[5].ci95 is None
    assert bins[9].hi == 1.0 and bins[9].ci95 == wilson(1, 1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        reliability([1.5], [True], [0])


def test_bars_of_a_bin_are_over_problems_not_answers() -> None:
    labels = np.random.default_rng(0).random(60) < 0.6
    apart, *_ = reliability(np.full(60, 0.01), labels, np.arange(60))
    copies, *_ = reliability(np.full(240, 0.01), np.repeat(labels, 4), np.repeat(range(60), 4))
    assert apart.ci95 is not None and copies.n == 240
    assert copies.ci95 == pytest.approx(apart.ci95)  # four equal answers say no more than one
    assert copies.ci95[0] < copies.accuracy < copies.ci95[1]
    assert reliability([0.01, 0.02], [True, False], [7, 7])[0].ci95 is None  # one problem
