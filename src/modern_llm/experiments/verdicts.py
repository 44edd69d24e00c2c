"""Whether one experiment is better than another: paired seeds, a named test, p below 0.01."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from scipy import stats

ALPHA = 0.01
TEST = "paired t-test over seeds, two-sided"
CORRECTED = f"{TEST}, Holm's correction"


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its 95 % t interval; ``None`` where there is one seed."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Verdict:
    """An experiment against the reference.

    Attributes:
        word: ``better``, ``worse``, ``not distinguishable``, or why there is none.
        difference: mean over the shared seeds of this one's value minus the reference's.
        low: of the 95 % t interval of the difference.
        high: of the same.
        p: of the test, corrected where several were made.
        n: shared seeds.
        test: name of the test.
    """

    word: str
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int
    test: str


def mean_of(values: Sequence[float]) -> Mean | None:
    """Mean and t interval of one value a seed; ``None`` without any."""
    if not values:
        return None
    low, high = t_interval(values)
    return Mean(math.fsum(values) / len(values), low, high, len(values))


def t_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % interval of a mean from Student's t; none for fewer than two values."""
    n = len(values)
    if n < 2:
        return None, None
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return mean - half, mean + half


def compare_to(
    reference: Mapping[int, float], others: Sequence[Mapping[int, float]], *, lower_is_better: bool
) -> list[Verdict]:
    """The verdict on each of ``others`` against ``reference``, all values by seed.

    Seeds that only one side has are left out. With several others the p values are Holm's
    (Holm 1979): the chance of any false verdict among them stays below 1 %.
    """
    verdicts = [_paired(reference, values) for values in others]
    tested = [i for i, verdict in enumerate(verdicts) if verdict.p is not None]
    if len(tested) > 1:
        raw = [verdicts[i].p or 0.0 for i in tested]
        for i, p in zip(tested, holm(raw), strict=True):
            verdicts[i] = replace(verdicts[i], p=p, test=CORRECTED)
    return [_worded(verdict, lower_is_better) for verdict in verdicts]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment; keeps the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def _paired(reference: Mapping[int, float], values: Mapping[int, float]) -> Verdict:
    seeds = sorted(reference.keys() & values.keys())
    differences = [values[seed] - reference[seed] for seed in seeds]
    n = len(differences)
    if n == 0:
        return Verdict("no shared seed: no verdict", None, None, None, None, 0, "none")
    mean = math.fsum(differences) / n
    if n == 1:
        return Verdict("one seed: no verdict", mean, None, None, None, 1, "none")
    low, high = t_interval(differences)
    spread = max(differences) - min(differences)
    if spread == 0:  # the test divides by the spread: equal runs are no evidence, or not random
        p = 1.0 if mean == 0 else 0.0
    else:
        p = float(stats.ttest_rel([values[s] for s in seeds], [reference[s] for s in seeds]).pvalue)
    return Verdict("", mean, low, high, p, n, TEST)


def _worded(verdict: Verdict, lower_is_better: bool) -> Verdict:
    if verdict.p is None or verdict.difference is None:
        return verdict
    if not verdict.p < ALPHA:
        return replace(verdict, word="not distinguishable")
    good = (verdict.difference < 0) == lower_is_better
    return replace(verdict, word="better" if good else "worse")
