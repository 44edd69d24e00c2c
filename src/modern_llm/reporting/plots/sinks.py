"""Figure of the study of attention sinks: losses by position, and what each arm loses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modern_llm.reporting.plots.canvas import COLOURS, NOTE, render

LOOKS = (  # colour and dash of the arms in turn
    (COLOURS["baseline"], "-"),
    (COLOURS["sft"], "-"),
    (COLOURS["pretrain"], "-"),
    (COLOURS["dpo"], "--"),
    (COLOURS["verifier"], "-."),
    ("#B87D00", ":"),
)
LABEL_GAP = 0.125  # of a panel's height, between two labels of two lines
ROOM = 1.5  # a panel's range is at least so many widths of its widest interval


@dataclass(frozen=True)
class Curve:
    """One arm: ``(position in contexts, value, low, high)`` of each bin, losses in nats."""

    label: str
    losses: tuple[tuple[float, float, float, float], ...]
    excess: tuple[tuple[float, float, float, float], ...]  # over the reference, on the same tokens


def losses_by_position(
    curves: Sequence[Curve], *, reference: str, evicted_from: float
) -> bytes | None:
    """Loss of every arm over the position, and below it what it has more than the reference.

    Args:
        curves: of the arms.
        reference: label of the arm that is zero in the lower panel.
        evicted_from: position in contexts from which a bounded cache drops keys.
    """
    drawn = [(c, *LOOKS[i % len(LOOKS)]) for i, c in enumerate(curves) if c.losses]
    if not drawn:
        return None

    def draw(figure: Any) -> None:
        above, below = figure.subplots(2, 1, sharex=True)
        for axes, part in ((above, "losses"), (below, "excess")):
            for curve, colour, dash in drawn:
                x, y, low, high = zip(*getattr(curve, part), strict=True)
                axes.fill_between(x, low, high, color=colour, alpha=0.16, lw=0)
                axes.plot(x, y, dash, color=colour, lw=1.7)
            for at in {1.0, min(evicted_from, 1.0)}:
                axes.axvline(at, color="#222222", lw=1.1 if at == 1 else 0.8, ls=":", zorder=1)
        below.set_ylim(*_close_up([curve for curve, *_ in drawn]))
        for axes, part in ((above, "losses"), (below, "excess")):
            _label(axes, [(c.label, _end(getattr(c, part)), colour) for c, colour, _ in drawn])
        top = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", **NOTE}
        above.annotate("context of training ends", (1, 1), xytext=(4, -9), **top)
        if evicted_from < 1:
            below.annotate("windows are full", (evicted_from, 0), xytext=(3, 5), rotation=90, **top)
        last = max(curve.losses[-1][0] for curve, *_ in drawn)
        above.set(title="loss by position, 95 % bands", ylabel="nats per token", xlim=(0, last))
        below.set(
            title=f"difference to {reference.replace(chr(10), ', ')}, same tokens",
            xlabel="position, in contexts of training", ylabel="nats per token",
        )  # fmt: skip

    return render(draw, 8.2, 6.4)


def _end(points: Sequence[tuple[float, float, float, float]]) -> float:
    """Mean value over the last context, where a label points to."""
    values = [value for at, value, *_ in points if at > points[-1][0] - 1]
    return sum(values) / len(values)


def _close_up(curves: Sequence[Curve]) -> tuple[float, float]:
    """Range of the lower panel: that of the arms which stay near the reference.

    An arm that ends far above all others runs out at the top.
    """
    ends = sorted(max(high for *_, high in c.excess) for c in curves)
    low = min(low for c in curves for _, _, low, _ in c.excess)
    kept = ends[0]
    for end in ends[1:]:
        if end > 4 * max(kept, -low, 0.02):
            break
        kept = end
    room = 0.1 * (kept - low)
    return low - room, kept + ROOM * room


def _label(axes: Any, ends: Sequence[tuple[str, float, str]]) -> None:
    """Write each line's label right of its end, moved apart where they would touch."""
    bottom, top = axes.get_ylim()
    places = sorted((min(max((y - bottom) / (top - bottom), 0), 1), i) for i, (_, y, _) in
                    enumerate(ends))  # fmt: skip
    heights = [place for place, _ in places]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + LABEL_GAP)
    over = heights[-1] - 1
    if over > 0:
        heights[-1] = 1
        for i in range(len(heights) - 2, -1, -1):
            heights[i] = min(heights[i], heights[i + 1] - LABEL_GAP)
    for height, (_, i) in zip(heights, places, strict=True):
        label, _, colour = ends[i]
        axes.annotate(
            label, (1, height), xycoords="axes fraction", xytext=(7, 0), va="center",
            textcoords="offset points", color=colour, fontsize=8.5, annotation_clip=False,
        )  # fmt: skip
