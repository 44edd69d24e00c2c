"""From losses by position to what is reported: means with intervals, breaks, differences."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modern_llm.evaluation.intervals import Floats, crossed_means, percentiles

BINS = 8  # a context; losses are kept as means over so many stretches of it
BROKEN_NATS = 0.1  # an arm is broken where its loss is surely so much above its own before


def bin_edges(context: int, contexts: int) -> list[int]:
    """Positions where the bins of a text begin, and the end of the last."""
    per_context = min(BINS, context)
    ends = np.linspace(0, context * contexts, per_context * contexts + 1)
    return [round(end) for end in ends]


def bin_means(nats_NT: Floats, edges: Sequence[int]) -> Floats:
    """Mean loss of each text in each bin: ``(N, bins)``."""
    starts, widths = edges[:-1], np.diff(edges)
    return np.add.reduceat(nats_NT, starts, axis=1) / widths


def summary(
    means_SNK: Floats, reference_SNK: Floats, edges: Sequence[int], *, context: int, window: int
) -> dict[str, Any]:
    """Bins, contexts and the break of one arm.

    Args:
        means_SNK: `bin_means` of each seed and text; texts are the same for all seeds.
        reference_SNK: those of the arm that others are compared with.
        edges: of the bins.
        context: tokens that the model was trained on.
        window: keys that a bounded cache holds: nothing is evicted before that position.

    Returns:
        ``bins`` and ``contexts`` with ``value`` and ``ci95`` (nats per token), ``against`` the
        reference in each bin (paired), ``settled``: the loss just before anything is evicted, and
        ``breaks_at``: the position in contexts of the first bin whose interval lies more than
        `BROKEN_NATS` above that, as does the interval of all from there on; None: nowhere.
    """
    settled_SN1 = means_SNK[:, :, _settled(edges, window)].mean(2, keepdims=True)
    rise_SNK = means_SNK - settled_SN1
    left_K = np.arange(rise_SNK.shape[2], 0, -1)  # bins from each one to the end
    onwards_SNK = rise_SNK[:, :, ::-1].cumsum(2)[:, :, ::-1] / left_K
    broken = [
        k
        for k, (here, onwards) in enumerate(zip(_low(rise_SNK), _low(onwards_SNK), strict=True))
        if edges[k + 1] > window and min(here, onwards) > BROKEN_NATS
    ]
    places = [edge / context for edge in edges]
    return {
        "bins": _rows(means_SNK, places),
        "against": _rows(means_SNK - reference_SNK, places),
        "contexts": _rows(by_context(means_SNK, edges, context), None),
        "settled": float(settled_SN1.mean()),
        "breaks_at": edges[broken[0]] / context if broken else None,
    }


def _low(values_SNK: Floats) -> list[float]:
    """Lower end of the interval of each mean."""
    return [interval[0] for x in crossed_means(values_SNK).T if (interval := percentiles(x))]


def _settled(edges: Sequence[int], window: int) -> list[int]:
    """Bins in the second half of the window: much is in view, nothing was evicted yet."""
    found = [
        k for k, start in enumerate(edges[:-1]) if start >= window // 2 and edges[k + 1] <= window
    ]
    return found or [0]


def by_context(means_SNK: Floats, edges: Sequence[int], context: int) -> Floats:
    """Means over whole contexts from those over bins: ``(S, N, contexts)``."""
    widths = np.diff(edges)
    per_context = len(widths) * context // edges[-1]
    weighted = (means_SNK * widths).reshape(*means_SNK.shape[:2], -1, per_context)
    return np.asarray(weighted.sum(3) / context)


def _rows(means_SNC: Floats, edges: Sequence[float] | None) -> list[dict[str, Any]]:
    resampled = crossed_means(means_SNC)
    rows = []
    for column, value in enumerate(means_SNC.mean((0, 1))):
        place = {"context": column + 1} if edges is None else {
            "from": edges[column], "to": edges[column + 1]
        }  # fmt: skip
        rows.append({**place, "value": float(value), "ci95": percentiles(resampled[:, column])})
    return rows


def difference(one_SN: Floats, other_SN: Floats) -> dict[str, Any]:
    """Mean of ``one - other`` on the same texts (and seeds), with its paired interval."""
    paired = (one_SN - other_SN)[:, :, None]
    return {"value": float(paired.mean()), "ci95": percentiles(crossed_means(paired)[:, 0])}


def differences(
    last: Mapping[str, Floats], pairs: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """`difference` in the last context of those pairs of arms that are there."""
    return [
        {
            "arm": one,
            "minus": other,
            "same_model": one.split("/")[0] == other.split("/")[0],
            **difference(last[one], last[other]),
        }
        for one, other in pairs
        if one in last and other in last and last[one].shape == last[other].shape
    ]
