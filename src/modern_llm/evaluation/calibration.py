"""How well scores separate right from wrong answers (AUROC) and mean what they say (ECE)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from modern_llm.evaluation.intervals import (
    Floats,
    bootstrap,
    bootstrap_mean,
    percentiles,
    resample_counts,
    share_interval,
)
from modern_llm.evaluation.scores import Interval, NotEvaluated, Result, Score


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability diagram: scores in ``[lo, hi)``, the last one closed."""

    lo: float
    hi: float
    mean_score: float | None  # None in an empty bin
    accuracy: float | None
    n: int
    ci95: Interval | None = None  # of the accuracy, over problems


def auroc(scores: ArrayLike, labels: ArrayLike) -> float | None:
    """Chance that a right answer scores above a wrong one; ties count one half.

    The Mann-Whitney statistic from ranks, O(n log n).

    Args:
        scores: ``(n,)``, higher means more likely right.
        labels: ``(n,)``, true where right.

    Returns:
        ``None`` when all labels are equal: there is nothing to separate.
    """
    truth = np.asarray(labels, dtype=bool)
    weights = np.ones((1, len(truth)))
    value = _weighted_auroc(np.asarray(scores, dtype=np.float64), truth, weights)[0]
    return float(value) if np.isfinite(value) else None


def _weighted_auroc(scores: Floats, truth: NDArray[np.bool_], weights: Floats) -> Floats:
    """AUROC of each row of weights ``(r, n)``: ``(r,)``, NaN where a class has no weight."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)  # first of each tie
    if not len(starts):
        return np.full(len(weights), np.nan)
    sorted_weights = weights[:, order]
    right = np.add.reduceat(sorted_weights * truth[order], starts, axis=1)
    wrong = np.add.reduceat(sorted_weights * ~truth[order], starts, axis=1)
    below = np.cumsum(wrong, axis=1) - wrong
    with np.errstate(invalid="ignore"):
        won = (right * (below + wrong / 2)).sum(axis=1)
        return np.asarray(won / (right.sum(axis=1) * wrong.sum(axis=1)), dtype=np.float64)


def auroc_score(scores: ArrayLike, labels: ArrayLike, groups: ArrayLike, *, key: str) -> Result:
    """AUROC with a bootstrap interval over groups (problems, whose answers are not independent).

    Args:
        scores: ``(n,)``.
        labels: ``(n,)``.
        groups: ``(n,)``, number of the problem that each answer belongs to, from 0.
        key: of the result.
    """
    values = np.asarray(scores, dtype=np.float64)
    truth = np.asarray(labels, dtype=bool)
    value = auroc(values, truth)
    if value is None:
        only = "right" if truth.any() else "wrong"
        why = f"all {len(truth)} answers are {only}" if len(truth) else "there are no answers"
        return NotEvaluated(f"{key} auroc", why)
    group = np.asarray(groups, dtype=np.int64)
    n_groups = int(group.max()) + 1
    resampled = np.concatenate(
        [
            _weighted_auroc(
                values, truth, resample_counts(n_groups, seed=s, resamples=100)[:, group]
            )
            for s in range(10)
        ]
    )
    ci95 = percentiles(resampled) if n_groups > 1 else None
    note = f"base rate {truth.mean():.3f}; interval: bootstrap over {n_groups} problems"
    return Score(key, "auroc", value, ci95, len(truth), note)


def auroc_within_score(
    scores: ArrayLike, labels: ArrayLike, groups: ArrayLike, *, key: str
) -> Result:
    """Mean over problems of the AUROC among one problem's answers.

    A score that only knows which problems are easy has a high AUROC over all answers and 0.5 here,
    which is all that helps to choose. Problems with answers of one kind have none.

    Args:
        scores: ``(n,)``.
        labels: ``(n,)``.
        groups: ``(n,)``, number of the problem that each answer belongs to.
        key: of the result.
    """
    values, truth, group = np.asarray(scores), np.asarray(labels), np.asarray(groups)
    problems = np.unique(group)
    each = [auroc(values[group == g], truth[group == g]) for g in problems]
    mixed = [value for value in each if value is not None]
    if not mixed:
        return NotEvaluated(f"{key} auroc_within", "no problem has right and wrong answers")
    note = f"mean over the {len(mixed)} of {len(problems)} problems with right and wrong answers"
    interval = bootstrap_mean(mixed) if len(mixed) > 1 else None
    return Score(key, "auroc_within", float(np.mean(mixed)), interval, len(mixed), note)


def reliability(
    scores: ArrayLike, labels: ArrayLike, groups: ArrayLike, *, n_bins: int = 10
) -> list[Bin]:
    """Equal-width bins of scores in [0, 1] with their mean score and share of right answers.

    Args:
        scores: ``(n,)`` in [0, 1].
        labels: ``(n,)``.
        groups: ``(n,)``, problem of each answer; intervals are over the problems of a bin, whose
            answers are not independent.
        n_bins: bins of equal width.
    """
    values = np.asarray(scores, dtype=np.float64)
    truth, group = np.asarray(labels, dtype=np.float64), np.asarray(groups)
    index = _bin_index(values, n_bins)
    bins = []
    for b in range(n_bins):
        here = index == b
        n = int(here.sum())
        _, problem = np.unique(group[here], return_inverse=True)
        bins.append(
            Bin(
                lo=b / n_bins,
                hi=(b + 1) / n_bins,
                mean_score=float(values[here].mean()) if n else None,
                accuracy=float(truth[here].mean()) if n else None,
                n=n,
                ci95=share_interval(np.bincount(problem, truth[here]), np.bincount(problem)),
            )
        )
    return bins


def _bin_index(scores: Floats, n_bins: int) -> NDArray[np.int64]:
    if len(scores) and not (scores.min() >= 0 and scores.max() <= 1):
        raise ValueError("scores must be in [0, 1]")
    return np.minimum((scores * n_bins).astype(np.int64), n_bins - 1)


def ece_score(
    scores: ArrayLike, labels: ArrayLike, groups: ArrayLike, *, key: str, n_bins: int = 10
) -> Result:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599, eq. 3), equal-width bins.

    Args:
        scores: ``(n,)`` in [0, 1].
        labels: ``(n,)``.
        groups: ``(n,)``, problem of each answer, from 0; the bootstrap draws problems.
        key: of the result.
        n_bins: bins of equal width.
    """
    values = np.asarray(scores, dtype=np.float64)
    if not len(values):
        return NotEvaluated(f"{key} ece", "there are no answers")
    group = np.asarray(groups, dtype=np.int64)
    rows = np.zeros((len(values), n_bins + 1))  # signed gap in its bin; count
    gap = np.asarray(labels, dtype=np.float64) - values
    rows[np.arange(len(values)), _bin_index(values, n_bins)] = gap
    rows[:, n_bins] = 1
    columns = np.zeros((int(group.max()) + 1, n_bins + 1))
    np.add.at(columns, group, rows)

    def error(sums: Floats) -> Floats:
        return np.asarray(np.abs(sums[:, :-1]).sum(axis=1) / sums[:, -1], dtype=np.float64)

    value = float(error(columns.sum(axis=0, keepdims=True))[0])
    note = f"{n_bins} equal bins; interval: bootstrap over problems, which leans upward"
    return Score(key, "ece", value, bootstrap(columns, error), len(values), note)
