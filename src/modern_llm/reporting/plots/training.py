"""Figures of the training: losses, speed, and what DPO does to its rewards."""

import math
from typing import Any

from modern_llm.reporting.plots.canvas import (
    COLOURS,
    NOTE,
    as_percent,
    panels,
    render,
    series,
    smooth,
)
from modern_llm.reporting.values import Run, StageRun

DPO_CAPTION = (
    "The chosen reward may fall: the loss asks for a growing margin, not for likelier answers."
)


def _mark_restarts(axes: Any, stage: StageRun) -> None:
    steps, _ = series(stage.rows("start"), "step")
    for step in [s for s in steps[1:] if s > 0]:
        axes.axvline(step, color="#999999", lw=0.9, ls=":", zorder=0)


def loss_curves(run: Run) -> bytes | None:
    """Training loss (raw and smoothed) and validation loss, one panel a stage."""
    stages = [s for s in run.stages.values() if series(s.rows("train"), "loss")[0]]
    if not stages:
        return None

    def draw(figure: Any) -> None:
        for axes, stage in zip(panels(figure, len(stages)), stages, strict=True):
            colour = COLOURS.get(stage.name, "#0072B2")
            steps, losses = series(stage.rows("train"), "loss")
            window = max(1, len(losses) // 25) | 1
            axes.plot(steps, losses, color=colour, alpha=0.25, lw=0.9)
            axes.plot(steps, smooth(losses, window), color=colour, label="train (smoothed)")
            at, held_out = series(stage.rows("eval"), "loss")
            if at:
                axes.plot(at, held_out, "o--", color="black", lw=1.2, ms=3.5, label="validation")
                best = min(range(len(at)), key=held_out.__getitem__)
                axes.plot(
                    at[best],
                    held_out[best],
                    "*",
                    color="#E69F00",
                    ms=11,
                    mec="black",
                    mew=0.6,
                    label=f"best {held_out[best]:.3f} at step {at[best]:.0f}",
                )
            if stage.name == "dpo" and run.config.get("dpo", {}).get("loss") != "ipo":
                axes.axhline(math.log(2), color="#999999", lw=1, ls="--", zorder=0)
                axes.annotate(
                    "ln 2",
                    (1, math.log(2)),
                    xycoords=("axes fraction", "data"),
                    xytext=(-2, 3),
                    textcoords="offset points",
                    ha="right",
                    **NOTE,
                )
            _mark_restarts(axes, stage)
            axes.set(title=stage.name, xlabel="step", ylabel=f"loss (nats per {stage.unit})")
            axes.legend(loc="upper right")

    lines = 2 if len(stages) == 4 else 1
    return render(draw, 4.4 * min(len(stages), 2 if lines == 2 else 3), 3.1 * lines)


def training_speed(run: Run) -> bytes | None:
    """Learning rate, gradient norm and tokens per second over the steps, all stages in a row."""
    stages = [s for s in run.stages.values() if series(s.rows("train"), "lr")[0]]
    if not stages:
        return None
    lengths = [series(s.rows("train"), "lr")[0][-1] for s in stages]
    starts = [0.0]
    for length in lengths:
        starts.append(starts[-1] + length)
    wanted = {
        "lr": "learning rate",
        "grad_norm": "gradient norm",
        "tokens_per_s": "tokens per second",
    }

    def draw(figure: Any) -> None:
        for axes, (name, label) in zip(figure.subplots(1, 3), wanted.items(), strict=True):
            for stage, start in zip(stages, starts, strict=False):
                steps, values = series(stage.rows("train"), name)
                axes.plot(
                    [start + s for s in steps],
                    values,
                    color=COLOURS.get(stage.name),
                    lw=1.4,
                    label=stage.name,
                )
            for border in starts[1:-1]:
                axes.axvline(border, color="#999999", lw=0.8, ls=":")
            axes.set(title=label, xlabel="step, counted over all stages")
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter("{x:,.0f}" if name == "tokens_per_s" else "{x:g}")
        figure.axes[0].legend(loc="best")

    return render(draw, 11, 3.1)


def dpo_panel(stage: StageRun) -> bytes | None:
    """Reward margin, pair accuracy, and both rewards over the steps of DPO."""
    curves = {
        name: {kind: series(stage.rows(kind), *names) for kind in ("train", "eval")}
        for name, names in {
            "margin": ("margin", "reward_margin"),
            "accuracy": ("accuracy", "pair_accuracy", "preference_accuracy"),
            "chosen": ("chosen_reward", "reward_chosen"),
            "rejected": ("rejected_reward", "reward_rejected"),
        }.items()
    }
    if not any(xs for kinds in curves.values() for xs, _ in kinds.values()):
        return None

    def curve(axes: Any, name: str, colour: str, label: str, dash: str = "-") -> None:
        steps, values = curves[name]["train"]
        if steps:
            axes.plot(steps, values, color=colour, alpha=0.22, lw=0.9)
            window = max(1, len(values) // 25) | 1
            axes.plot(steps, smooth(values, window), dash, color=colour, label=label)
        at, held_out = curves[name]["eval"]
        if at:
            axes.plot(
                at,
                held_out,
                "o--",
                color=colour,
                ms=3.5,
                lw=1,
                mec="black",
                mew=0.6,
                label=f"{label}, validation",
            )

    def draw(figure: Any) -> None:
        margin, accuracy, rewards = figure.subplots(1, 3)
        curve(margin, "margin", COLOURS["dpo"], "margin")
        margin.axhline(0, color="#999999", lw=0.9)
        margin.set(title="reward margin", xlabel="step", ylabel="chosen - rejected (nats)")
        curve(accuracy, "accuracy", COLOURS["pretrain"], "accuracy")
        accuracy.axhline(0.5, color="#999999", lw=0.9, ls="--")
        accuracy.set(
            title="pair accuracy", xlabel="step", ylabel="pairs in the right order", ylim=(0, 1.03)
        )
        accuracy.yaxis.set_major_formatter(as_percent())
        curve(rewards, "chosen", COLOURS["dpo"], "chosen")
        curve(rewards, "rejected", COLOURS["sft"], "rejected", "-.")
        rewards.axhline(0, color="#999999", lw=0.9)
        rewards.set(title="rewards", xlabel="step", ylabel="beta x log-ratio (nats)")
        for axes in (margin, accuracy, rewards):
            axes.legend(loc="best")
        figure.supxlabel(DPO_CAPTION, x=0.99, ha="right", **NOTE)

    return render(draw, 11, 3.4)
