"""Figures of a comparison of experiments: ranking, curves with bands, quality against cost."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from modern_llm.reporting.plots.canvas import NOTE, panels, render

REFERENCE = "#777777"
BETTER, WORSE, NEUTRAL = "#009E73", "#D55E00", "#0072B2"
WORDS = {"better": BETTER, "worse": WORSE, "reference": REFERENCE}
LABELS = {"final_val_loss": "validation loss (nats per token)", "bits_per_byte": "bits per byte"}
COSTS = {
    "train_flops": "training FLOPs",
    "params_millions": "parameters",
    "train_time_s": "training seconds",
}
BARS = {
    "tokens_per_s": "tokens/s, training",
    "inference_tokens_per_s": "tokens/s, decoding",
    "peak_memory_mb": "peak memory (MB)",
}

Row = dict[str, Any]


def comparison_figures(record: Row) -> dict[str, bytes]:
    """Every figure of a comparison's record, by file name."""
    return {
        "ranking.png": ranking(record),
        "curves.png": curves(record),
        "pareto.png": pareto(record),
    }


def _colour(row: Row) -> str:
    return WORDS.get(row["verdict"], NEUTRAL)


def ranking(record: Row) -> bytes:
    """Difference from the reference with its paired interval; beside it speed and memory."""
    metric = record["metric"]
    rows = sorted(record["rows"], key=lambda row: -row[metric])
    names = [f"{row['experiment']}  {row[metric]:.3f}" for row in rows]
    at = range(len(rows))

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 1 + len(BARS), sharey=True, width_ratios=[2, 1, 1, 1])
        first = axes[0]
        first.axvline(0, color=REFERENCE, lw=1, ls="--", zorder=0)
        for y, row in zip(at, rows, strict=True):
            if row["difference_low"] is not None:
                ends = [row["difference_low"], row["difference_high"]]
                first.plot(ends, [y, y], color=_colour(row), lw=2.2)
            first.plot(row["difference"] or 0, y, "o", color=_colour(row), ms=6)
        first.set_yticks(list(at), names)
        first.set(ylim=(-0.6, len(rows) - 0.4), xlabel=f"{LABELS[metric]}, lower is better")
        first.xaxis.set_major_locator(_few_ticks(5))
        first.set_title(f"difference from {record['reference']}")
        for panel, (name, label) in zip(axes[1:], BARS.items(), strict=True):
            panel.barh(at, [row[name] or 0 for row in rows], color="#9ecae1", height=0.62)
            for y, row in zip(at, rows, strict=True):
                low, high = row[f"{name}_low"], row[f"{name}_high"]
                if low is not None:
                    panel.plot([max(low, 0), high], [y, y], color="#333333", lw=1)
            panel.set_title(label)
            panel.xaxis.set_major_locator(_few_ticks())
            panel.xaxis.set_major_formatter("{x:,.0f}")
        _explain_colours(figure, {row["verdict"] for row in rows})

    return render(draw, 10.5, 1.5 + 0.33 * len(rows))


def _explain_colours(figure: Any, words: set[str]) -> None:
    from matplotlib.lines import Line2D

    colours = {"better": BETTER, "worse": WORSE, "not distinguishable": NEUTRAL}
    shown = [word for word in colours if word in words]
    if shown:
        marks = [Line2D([], [], color=colours[word], marker="o", lw=2.2) for word in shown]
        figure.legend(marks, shown, loc="outside lower left", ncols=3)


def _few_ticks(count: int = 3) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count)


def curves(record: Row) -> bytes:
    """Validation loss over tokens with bands, a panel each beside the reference in grey."""
    verdicts = {row["experiment"]: row for row in record["rows"]}
    bands = {name: [p for p in band if p["step"]] for name, band in record["bands"].items()}
    others = [name for name in bands if name != record["reference"]]
    ends = [
        point[end] if point["low"] is not None else point["loss"]
        for band in bands.values()
        for point in band
        for end in ("low", "high")
    ]

    def draw(figure: Any) -> None:
        for axes, name in zip(panels(figure, len(others)), others, strict=True):
            _draw_band(axes, bands[record["reference"]], REFERENCE, record["reference"])
            _draw_band(axes, bands[name], _colour(verdicts[name]), name)
            axes.set_title(f"{name}: {verdicts[name]['verdict']}")
            axes.xaxis.set_major_formatter(_short_ticks())
            axes.set_xlabel("tokens")
            if ends:
                axes.set_ylim(min(ends) * 0.985, max(ends) * 1.01)
        figure.supylabel("validation loss (nats per token)", fontsize=9.5)

    lines = math.ceil(len(others) / 3) if len(others) != 4 else 2
    return render(draw, 3.5 * min(3, max(2, len(others))), 2.5 * lines)


def _draw_band(axes: Any, band: Sequence[Row], colour: str, name: str) -> None:
    tokens = [point["tokens"] for point in band]
    marker = "o" if len(band) < 3 else None  # a line of one point would not be seen
    axes.plot(tokens, [point["loss"] for point in band], color=colour, label=name, marker=marker)
    if band and band[0]["low"] is not None:
        low, high = ([point[end] for point in band] for end in ("low", "high"))
        axes.fill_between(tokens, low, high, color=colour, alpha=0.25, lw=0)


def _short_ticks() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both coordinates, lower is better, by the first.

    Of equal points the first stays.
    """
    best, kept = math.inf, []
    for i in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        if points[i][1] < best:
            best = points[i][1]
            kept.append(i)
    return kept


def pareto(record: Row) -> bytes:
    """Quality against training FLOPs, parameters and seconds, with the Pareto front of each."""
    metric, rows = record["metric"], record["rows"]

    def draw(figure: Any) -> None:
        for axes, (cost, label) in zip(
            figure.subplots(1, 3, sharey=True), COSTS.items(), strict=True
        ):
            unit = 1e6 if cost == "params_millions" else 1
            points = [(row[cost] * unit, row[metric]) for row in rows]
            best = front(points)
            axes.plot(
                [points[i][0] for i in best], [points[i][1] for i in best], "-", color="#bbbbbb",
                lw=1.2, zorder=0,
            )  # fmt: skip
            for row, (x, y) in zip(rows, points, strict=True):
                if row[f"{metric}_low"] is not None:
                    ends = [row[f"{metric}_low"], row[f"{metric}_high"]]
                    axes.plot([x, x], ends, color=_colour(row), lw=0.8, alpha=0.6)
                axes.plot(x, y, "o", color=_colour(row), ms=5)
            _name_points(axes, rows, points, best)
            axes.set_xlabel(label)
            axes.margins(x=0.18, y=0.1)
            axes.xaxis.set_major_formatter(_short_ticks())
            axes.xaxis.set_major_locator(_few_ticks())
        figure.axes[0].set_ylabel(LABELS[metric])

    return render(draw, 10.5, 3.6)


def _name_points(
    axes: Any, rows: Sequence[Mapping[str, Any]], points: Sequence[tuple[float, float]],
    best: Sequence[int],
) -> None:  # fmt: skip
    """Names of the points on the front and of the extremes; the ranking names all."""
    worst = max(range(len(points)), key=lambda i: points[i][1])
    dearest = max(range(len(points)), key=lambda i: points[i][0])
    for i in dict.fromkeys([*best, worst, dearest]):
        axes.annotate(
            rows[i]["experiment"], points[i], xytext=(5, 4), textcoords="offset points", **NOTE
        )
