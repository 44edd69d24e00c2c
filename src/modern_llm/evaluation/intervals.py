"""95 % intervals: Wilson for a share, percentile bootstrap for everything else."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from modern_llm.evaluation.scores import Interval

Floats = NDArray[np.float64]

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
RESAMPLES = 2000
_CHUNK = 4_000_000  # resampled counts held at once


def wilson(successes: float, n: int) -> Interval | None:
    """Wilson score interval of a share (Wilson 1927); ``None`` when ``n`` is 0.

    Args:
        successes: count of successes; ties may count one half.
        n: count of trials.
    """
    if n == 0:
        return None
    share = successes / n
    centre = share + Z95**2 / (2 * n)
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    scale = 1 + Z95**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def resample_counts(n: int, *, seed: int = 0, resamples: int = RESAMPLES) -> Floats:
    """How often each of ``n`` units is drawn in each resample: ``(resamples, n)``."""
    rng = np.random.default_rng(seed)
    counts = np.empty((resamples, n))
    for row in counts:
        row[:] = np.bincount(rng.integers(0, n, n), minlength=n)
    return counts


def bootstrap(
    columns: ArrayLike,
    statistic: Callable[[Floats], Floats],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """Percentile bootstrap of a statistic of sums over independent units.

    Args:
        columns: ``(n, c)``, what each unit adds to each of ``c`` sums.
        statistic: maps sums ``(r, c)`` of ``r`` resamples to ``(r,)`` values; non-finite values
            (a resample without a needed class) are left out.
        seed: seed of the resampling.
        resamples: how many.

    Returns:
        The 2.5 and 97.5 percentiles, or ``None`` for fewer than two units.
    """
    units = np.asarray(columns, dtype=np.float64)
    n = len(units)
    if n < 2:
        return None
    step = max(1, _CHUNK // n)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.concatenate(
            [
                statistic(
                    resample_counts(n, seed=seed + at, resamples=min(step, resamples - at)) @ units
                )
                for at in range(0, resamples, step)
            ]
        )
    return percentiles(values)


def percentiles(values: Floats) -> Interval | None:
    """2.5 and 97.5 percentiles of the finite ``values``; ``None`` when there are none."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_mean(values: ArrayLike, *, seed: int = 0) -> Interval | None:
    """Bootstrap interval of a mean over independent units."""
    unit_values = np.asarray(values, dtype=np.float64)
    columns = np.stack([unit_values, np.ones_like(unit_values)], axis=1)
    return bootstrap(columns, lambda sums: sums[:, 0] / sums[:, 1], seed=seed)


def share_interval(values: ArrayLike, weights: ArrayLike | None = None) -> Interval | None:
    """Interval of a share: ``sum(values) / sum(weights)`` over independent units.

    Bootstrap over the units; where all units are 0, or all are whole, the bootstrap would have no
    width and Wilson's interval stands in, a trial for each unit.

    Args:
        values: ``(n,)``, each from 0 to its weight.
        weights: ``(n,)``; default: 1 each.
    """
    parts = np.asarray(values, dtype=np.float64)
    wholes = np.ones_like(parts) if weights is None else np.asarray(weights, dtype=np.float64)
    for share in (0, 1):
        if len(parts) and np.all(parts == share * wholes):
            return wilson(share * len(parts), len(parts))
    return bootstrap(np.stack([parts, wholes], axis=1), lambda sums: sums[:, 0] / sums[:, 1])


def crossed_means(values_SNC: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> Floats:
    """Bootstrap of means over two crossed factors, such as training seeds and texts.

    Each resample draws rows of both factors, with replacement, and takes the mean over all pairs;
    a factor of a single row is held as it is.

    Args:
        values_SNC: ``(S, N, C)``: C values of each pair.
        seed: seed of the resampling.
        resamples: how many.

    Returns:
        Resampled means ``(resamples, C)``, for `percentiles`.
    """
    values = np.asarray(values_SNC, dtype=np.float64)
    counts_RS = resample_counts(values.shape[0], seed=seed + 1, resamples=resamples)
    counts_RN = resample_counts(values.shape[1], seed=seed, resamples=resamples)
    totals = np.zeros((resamples, values.shape[2]))
    for count_R, values_NC in zip(counts_RS.T, values, strict=True):
        totals += count_R[:, None] * (counts_RN @ values_NC)
    return np.asarray(totals / (values.shape[0] * values.shape[1]))
