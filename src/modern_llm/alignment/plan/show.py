"""The plan on the console."""

import math
import sys

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from modern_llm.alignment.plan.fit import Fit, StageFit
from modern_llm.alignment.plan.machine import USABLE, Machine
from modern_llm.alignment.preflight import Preflight, StagePlan
from modern_llm.config import PipelineConfig
from modern_llm.errors import ConfigError
from modern_llm.training.memory import Footprint, Share, State
from modern_llm.training.throughput import ASSUMED_MFU

PARTS = {  # of a `Footprint` -> head of its column, short enough for 80 columns
    "parameters": "params", "gradients": "grads", "optimizer": "optim", "activations": "activ",
    "loss": "loss", "buffers": "buffers",
}  # fmt: skip


def print_plan(
    config: PipelineConfig,
    preflight: Preflight,
    machine: Machine | None = None,
    *,
    limit_s: float | None = None,
) -> int:
    """Print the plan to standard output and the problems after it.

    Args:
        config: the whole run.
        preflight: of the same; what is missing on this machine is no problem of a plan for another.
        machine: what the plan is for; ``None``: this machine.
        limit_s: time that a job has; the plan says when it is too short.

    Returns:
        Exit code: 0, or that of the first problem.
    """
    out = Console(file=sys.stdout, highlight=False)
    fit = Fit(config, preflight.trained, machine) if machine else None
    _print_model(out, config, preflight)
    if preflight.trained:
        _print_work(out, preflight.plan(), fit)
        if fit is None:
            out.print(
                f"memory: {preflight.state_gb():.2f} GB of weights, gradients and optimizer state, "
                "activations on top; --gpu NAME tells all parts, and what fits"
            )
        else:
            _print_memory(out, fit)
            _print_choice(out, fit)
        _print_disk(out, config, preflight)
        if limit_s is not None:
            out.print(_time_limit(preflight.plan(), fit, limit_s), soft_wrap=True)
    here = [p for p in preflight.problems if machine is None or isinstance(p, ConfigError)]
    problems = [*(fit.problems if fit else []), *here]
    if not problems:
        where = "; data, checkpoints and disk are to be there, not here" if machine else ""
        out.print(f"ready: nothing stands in the way; nothing was written{where}")
        return 0
    out.print("[bold]stands in the way:[/]")
    for problem in problems:
        out.print(f"  {problem}", markup=False, soft_wrap=True)
    return problems[0].exit_code


def _time_limit(plans: list[StagePlan], fit: Fit | None, limit_s: float) -> str:
    """How the estimate stands to the time that a job has."""
    hours = [fit.stages[i].hours(p.flops) if fit else p.hours for i, p in enumerate(plans)]
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


def _print_model(out: Console, config: PipelineConfig, preflight: Preflight) -> None:
    cost, model = preflight.cost, config.model
    out.print(
        f"[bold]{config.name}[/]: {cost.params / 1e6:,.1f} M parameters "
        f"({cost.embedding_params / 1e6:,.1f} M embedding), "
        f"{model.n_layers} layers, {model.n_heads}/{model.n_kv_heads} heads, {model.d_model} wide, "
        f"context {model.max_seq_len}; "
        f"{cost.flops_per_token_training / 1e6:,.1f} MFLOPs a trained token"
    )


def _print_work(out: Console, plans: list[StagePlan], fit: Fit | None) -> None:
    """Steps, tokens and hours of every stage."""
    columns = ["stage", "steps", "rows/step", "tokens/row", "tokens", "FLOPs", "hours"]
    table = _table(*columns, *(["GPU-hours"] if fit else []))
    for i, plan in enumerate(plans):
        hours = fit.stages[i].hours(plan.flops) if fit else plan.hours
        row = [
            plan.stage, f"{plan.steps:,}", str(plan.batch_size), str(plan.seq_len),
            f"{plan.tokens / 1e6:,.1f} M", f"{plan.flops:.2e}", _number(hours),
        ]  # fmt: skip
        if fit:
            row.append(_number(hours and hours * fit.machine.gpus))
        table.add_row(*row)
    out.print(table)
    mfu = fit.machine.mfu if fit else ASSUMED_MFU
    unknown = "no figure for the precision" if fit else "peak unknown or device not here"
    out.print(
        f"tokens count padding; hours at {mfu:.0%} of the device's peak "
        f"(an assumption; sampling and evaluation come on top; n/a: {unknown})"
    )


def _table(*heads: str) -> Table:
    """A table that 80 columns have room for."""
    return Table(*heads, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:,.2f}"


def _print_memory(out: Console, fit: Fit) -> None:
    """Every engine at the micro-batch of the config, for the stage that takes most."""
    machine = fit.machine
    rows = {stage.stage: _footprints(fit, stage) for stage in fit.stages}
    stage = max(fit.stages, key=lambda s: max(f.total for f in rows[s.stage].values()))
    training = stage.training
    again = ", activations computed again" if training.activation_checkpointing else ""
    nodes = f"{machine.nodes} node{'s' * (machine.nodes > 1)} of {machine.per_node}"
    out.print(
        f"memory of a GPU in GB, {machine.gpus} x {machine.name} ({nodes}), of "
        f"{machine.card.memory_gb:g} GB {USABLE:.0%} usable: {machine.usable_bytes / 1e9:.1f}; "
        f"{stage.stage}, {training.micro_batch_size} rows of {training.seq_len} tokens at once, "
        f"{stage.precision}{again}:"
    )
    heads = ("engine", *PARTS.values(), "total", "most rows")
    table = _table(*heads)
    for share, parts in rows[stage.stage].items():
        most = stage.largest(share, checkpointing=training.activation_checkpointing)
        sizes = [getattr(parts, part) for part in PARTS]
        fits = parts.total <= machine.usable_bytes
        total = f"{parts.total / 1e9:,.2f}"
        table.add_row(
            str(share), *(f"{size / 1e9:,.2f}" for size in sizes),
            total if fits else f"{total} no", "-" if most is None else str(most),
        )  # fmt: skip
    out.print(table)
    out.print(
        "  params, gradients, optimizer moments; kept activations; logits and their gradient; "
        "buffers: what the engine puts together and autocast copies; most rows at once that fit"
    )
    notes: dict[str, list[str]] = {}
    for each in fit.stages:
        for told in each.activations(1).notes:
            notes.setdefault(told, []).append(each.stage)
    for told, stages in notes.items():
        out.print(f"  {', '.join(stages)}: {told}", markup=False)
    if any(each.training.compile for each in fit.stages):
        out.print("  activations are those of eager blocks; compiled ones keep less")


def _footprints(fit: Fit, stage: StageFit) -> dict[Share, Footprint]:
    training = stage.training
    return {
        share: stage.footprint(
            share, training.micro_batch_size, checkpointing=training.activation_checkpointing
        )
        for share in fit.shares()
    }


def _print_choice(out: Console, fit: Fit) -> None:
    """The engine and micro-batches to take."""
    choice = fit.choice
    if choice is None:
        out.print("recommended: nothing; see below")
        return
    micro = ", ".join(f"{stage} {rows}" for stage, rows in choice.micro.items())
    again = ", activations computed again" if choice.checkpointing else ""
    out.print(f"recommended: {choice.share}{again}; rows at once: {micro}")
    if added := choice.overrides(fit.config, [stage.stage for stage in fit.stages]):
        out.print(f"  {' '.join(added)}", markup=False, soft_wrap=True)


def _print_disk(out: Console, config: PipelineConfig, preflight: Preflight) -> None:
    """Checkpoints: one, all, and what gathering one takes."""
    largest = max(
        (State(config.model, config.stage(stage).training) for stage in preflight.trained),
        key=State.checkpoint_bytes,
    )
    out.print(
        f"checkpoint: {largest.weights_bytes() / 1e9:.2f} GB of weights, "
        f"{largest.checkpoint_bytes() / 1e9:.2f} GB to go on from, and as much host memory of "
        f"rank 0 while it is written; disk: up to {preflight.disk_gb():.2f} GB of checkpoints"
    )
