"""Figures of the evaluation: scores side by side, best of n, calibration of the verifier."""

from typing import Any

from modern_llm.reporting.measures import column, measure_of
from modern_llm.reporting.plots.canvas import COLOURS, NOTE, as_percent, render
from modern_llm.reporting.values import EvalRun, Reasoning


def stage_bars(evaluation: EvalRun) -> bytes | None:
    """The main scores of every model side by side, with 95 % intervals; one panel a measure."""
    names = [m.stage for m in evaluation.models] + [name for name, _ in evaluation.baselines]
    scores = [m.scores for m in evaluation.models] + [s for _, s in evaluation.baselines]
    panels = []
    for measure in ("perplexity", "bits", "strict", "preference"):
        cells = column(scores, measure)
        bars = [(n, c) for n, c in zip(names, cells, strict=True) if c and c.value is not None]
        if bars:
            panels.append(bars)
    if not panels:
        return None

    def draw(figure: Any) -> None:
        for axes, bars in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            kind = measure_of(bars[0][1])
            for x, (name, score) in enumerate(bars):
                value = score.value or 0.0
                axes.bar(x, value, 0.62, color=COLOURS.get(name, COLOURS["baseline"]))
                top = value
                if score.ci95:
                    lo, top = score.ci95
                    axes.errorbar(
                        x,
                        value,
                        [[max(0, value - lo)], [max(0, top - value)]],
                        color="#222222",
                        lw=1.2,
                        capsize=4,
                    )
                text = f"{value:.1%}" if kind.is_fraction else f"{value:.{kind.digits}f}"
                axes.annotate(
                    text,
                    (x, top),
                    xytext=(0, 4),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8.5,
                )
            axes.set_xticks(range(len(bars)), [name for name, _ in bars])
            axes.grid(axis="x", visible=False)
            better = "higher" if kind.higher_is_better else "lower"
            axes.set_title(kind.label)
            axes.set_xlabel(f"{better} is better\n{bars[0][1].key}", **NOTE)
            axes.margins(y=0.16)
            if kind.is_fraction:
                axes.yaxis.set_major_formatter(as_percent())
                axes.set_ylim(0, min(1.12, axes.get_ylim()[1]))

    return render(draw, 2.9 * len(panels) + 0.4, 3.4)


def best_of_n(reasoning: Reasoning) -> bytes | None:
    """Right answers over samples a problem, for each way to choose; 95 % bands."""
    if not reasoning.n or not (reasoning.curves or reasoning.pass1):
        return None
    looks = {
        "oracle": ("#777777", "^", ":", "oracle (any of n is right)"),
        "verifier": (COLOURS["verifier"], "o", "-", "verifier's best of n"),
        "most_likely": (COLOURS["dpo"], "D", "-.", "most likely of n"),
        "majority": (COLOURS["pretrain"], "s", "--", "majority of n"),
    }

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, (colour, marker, dash, label) in looks.items():
            points = reasoning.curves.get(name)
            if not points:
                continue
            axes.fill_between(
                reasoning.n,
                [p.lo for p in points],
                [p.hi for p in points],
                color=colour,
                alpha=0.15,
                lw=0,
            )
            axes.plot(
                reasoning.n,
                [p.value for p in points],
                dash,
                marker=marker,
                color=colour,
                label=f"{label}: {points[-1].value:.1%}",
            )
        one = reasoning.pass1
        if one:
            axes.axhspan(one.lo, one.hi, color="#E69F00", alpha=0.13, lw=0)
            axes.axhline(
                one.value, color="#B87D00", lw=1.4, ls="-.", label=f"pass@1: {one.value:.1%}"
            )
        if max(reasoning.n) > 1:
            axes.set_xscale("log", base=2)
        axes.set_xticks(reasoning.n, [str(n) for n in reasoning.n])
        axes.minorticks_off()
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(as_percent())
        count = f", {reasoning.n_problems} problems" if reasoning.n_problems else ""
        axes.set(
            title=f"best of n, policy {reasoning.policy}{count}",
            xlabel="samples a problem, n",
            ylabel="problems answered right",
        )
        axes.legend(
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            title=f"at n = {reasoning.n[-1]}",
            alignment="left",
            title_fontsize=9,
        )

    return render(draw, 7.6, 3.8)


def calibration(reasoning: Reasoning) -> bytes | None:
    """Reliability diagram of the verifier above the histogram of its scores."""
    bins = reasoning.bins
    if not bins:
        return None
    colour = COLOURS["verifier"]

    def draw(figure: Any) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.plot([0, 1], [0, 1], color="#999999", ls="--", lw=1, label="perfectly calibrated")
        for b in bins:
            if b.ci95:
                above.plot([b.mean_score] * 2, b.ci95, color=colour, lw=1, alpha=0.6)
        above.plot(
            [b.mean_score for b in bins],
            [b.accuracy for b in bins],
            "o-",
            color=colour,
            lw=1.4,
            label="verifier, 95 % bars over problems",
        )
        if reasoning.base_rate is not None:
            above.axhline(
                reasoning.base_rate,
                color="#B87D00",
                lw=1.2,
                ls="-.",
                label=f"base rate {reasoning.base_rate:.1%}",
            )
        named = [
            f"{name} {s.value:.3f}"
            for name, s in (("AUROC", reasoning.auroc), ("ECE", reasoning.ece))
            if s and s.value is not None
        ]
        above.set(
            title="verifier: " + (", ".join(named) or "calibration"),
            xlim=(0, 1),
            ylim=(-0.02, 1.02),
            ylabel="share that is right",
        )
        above.yaxis.set_major_formatter(as_percent())
        above.legend(loc="upper left")
        below.bar(
            [b.lo for b in bins],
            [b.n for b in bins],
            [b.hi - b.lo for b in bins],
            align="edge",
            color=colour,
            alpha=0.55,
            edgecolor="white",
        )
        below.set(xlabel="score of the verifier", ylabel="samples")

    return render(draw, 5.4, 4.6)
