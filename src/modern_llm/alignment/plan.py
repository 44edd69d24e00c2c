"""What ``--dry-run`` prints: sizes, work, memory and time of a run, and what stands in its way."""

import math
import sys

from rich.console import Console
from rich.table import Table

from modern_llm.alignment.preflight import Preflight
from modern_llm.config import PipelineConfig
from modern_llm.training.throughput import ASSUMED_MFU


def print_plan(
    config: PipelineConfig, preflight: Preflight, *, limit_s: float | None = None
) -> int:
    """Print the plan to standard output and the problems after it.

    Args:
        config: the whole run.
        preflight: of the stages that are asked for.
        limit_s: time that a job has; the plan says when it is too short.

    Returns:
        Exit code: 0, or that of the first problem.
    """
    out = Console(file=sys.stdout, highlight=False)
    cost, model = preflight.cost, config.model
    out.print(
        f"[bold]{config.name}[/]: {cost.params / 1e6:,.1f} M parameters "
        f"({cost.embedding_params / 1e6:,.1f} M embedding), "
        f"{model.n_layers} layers, {model.n_heads}/{model.n_kv_heads} heads, {model.d_model} wide, "
        f"context {model.max_seq_len}; "
        f"{cost.flops_per_token_training / 1e6:,.1f} MFLOPs a trained token"
    )
    if preflight.trained:
        table = Table("stage", "steps", "rows/step", "tokens/row", "tokens", "FLOPs", "hours")
        for plan in preflight.plan():
            table.add_row(
                plan.stage, f"{plan.steps:,}", str(plan.batch_size), str(plan.seq_len),
                f"{plan.tokens / 1e6:,.1f} M", f"{plan.flops:.2e}",
                "n/a" if plan.hours is None else f"{plan.hours:.2f}",
            )  # fmt: skip
        out.print(table)
        out.print(
            f"tokens count padding; hours at {ASSUMED_MFU:.0%} of the device's peak "
            "(an assumption; sampling and evaluation come on top; "
            "n/a: peak unknown or device not here)"
        )
        out.print(
            f"memory: {preflight.state_gb():.2f} GB of weights, gradients and optimizer state, "
            f"activations on top; disk: up to {preflight.disk_gb():.2f} GB of checkpoints"
        )
    if limit_s is not None and preflight.trained:
        out.print(_time_limit(preflight, limit_s), soft_wrap=True)
    if not preflight.problems:
        out.print("ready: nothing stands in the way; nothing was written")
        return 0
    out.print("[bold]stands in the way:[/]")
    for problem in preflight.problems:
        out.print(f"  {problem}", markup=False, soft_wrap=True)
    return preflight.problems[0].exit_code


def _time_limit(preflight: Preflight, limit_s: float) -> str:
    """How the estimate stands to the time that a job has."""
    hours = [plan.hours for plan in preflight.plan()]
    known = [h for h in hours if h is not None]
    if len(known) < len(hours):
        return "time limit: no estimate to compare with, the device's peak is not known here"
    total, limit = sum(known), limit_s / 3600
    if total <= limit:
        return f"time limit: {limit:.2f} h, the estimate of {total:.2f} h fits"
    return (
        f"warning: the estimate of {total:.2f} h exceeds the time limit of {limit:.2f} h: this "
        f"takes a chain of {math.ceil(total / limit)} jobs or more, each going on from the last"
    )
