"""Figures as PNG bytes, the same bytes for the same numbers; the only door to matplotlib."""

from modern_llm.reporting.plots.evaluation import best_of_n, calibration, stage_bars
from modern_llm.reporting.plots.training import DPO_CAPTION, dpo_panel, loss_curves, training_speed
from modern_llm.reporting.values import Run

__all__ = [
    "DPO_CAPTION",
    "best_of_n",
    "calibration",
    "dpo_panel",
    "figures",
    "loss_curves",
    "stage_bars",
    "training_speed",
]


def figures(run: Run) -> dict[str, bytes]:
    """Every figure that the run has numbers for, by file name, in the order of the report."""
    found: dict[str, bytes | None] = {"stages.png": stage_bars(run.evaluation)}
    found["loss.png"] = loss_curves(run)
    found["training.png"] = training_speed(run)
    found["dpo.png"] = dpo_panel(run.stages["dpo"])
    if run.evaluation.reasoning:
        found["best_of_n.png"] = best_of_n(run.evaluation.reasoning)
        found["calibration.png"] = calibration(run.evaluation.reasoning)
    return {name: png for name, png in found.items() if png}
