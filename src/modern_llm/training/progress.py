"""What a run tells while it trains: rows of ``metrics.jsonl`` and a live line on the console."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from modern_llm.config import TrainingConfig
from modern_llm.runtime.artifacts import JsonLines
from modern_llm.runtime.environment import environment, utc_now
from modern_llm.runtime.logs import Trackers, console, get_logger
from modern_llm.runtime.ranks import group
from modern_llm.training.records import Progress, StepStats, perplexity
from modern_llm.training.throughput import Work, mfu

log = get_logger(__name__)


def train_row(
    stats: StepStats,
    now: Progress,
    last: Progress,
    *,
    likelihood: bool,
    work: Work | None,
    peak: float | None,
) -> dict[str, Any]:
    """Numbers of the newest step, and the speed since the last row.

    Args:
        stats: of the step.
        now: progress after it.
        last: progress at the last row.
        likelihood: the loss is nats of a token, so it has a perplexity.
        work: FLOPs of a token, for TFLOP/s and MFU.
        peak: FLOP/s of the device, for the MFU.
    """
    seconds, tokens = now.seconds - last.seconds, now.tokens - last.tokens
    scored = now.scored - last.scored
    flops_per_s = None if work is None else work.flops(tokens, scored) / seconds
    return {
        "step": now.step,
        "loss": stats.loss,
        **({"perplexity": perplexity(stats.loss)} if likelihood else {}),
        "lr": stats.lr,
        "grad_norm": stats.grad_norm,
        "tokens": now.tokens,
        "units": now.units,
        "tokens_per_s": round(tokens / seconds, 1),
        "step_s": round(seconds / (now.step - last.step), 6),
        "tflops": flops_per_s and flops_per_s / 1e12,
        "mfu": mfu(flops_per_s, peak),
        "time_s": round(now.seconds, 3),
        **{name: value.tolist() for name, value in stats.metrics.items()},
    }


def ranks_row(now: Progress, last: Progress, memory: Mapping[str, float]) -> dict[str, Any]:
    """What each of several ranks took a step for itself, and its memory; all ranks call it.

    Args:
        now: progress after the newest step.
        last: progress at the last row.
        memory: of this rank, see `memory_row`.
    """
    if group().world_size == 1:
        return {}
    busy_s = (now.busy_s - last.busy_s) / (now.step - last.step)
    busy, peaks = zip(*group().gather([busy_s, memory["memory_peak_gb"]]), strict=True)
    return {
        "busy_s_of_ranks": [round(s, 6) for s in busy],  # loading and forward passes
        "memory_peak_gb_of_ranks": list(peaks),
        "slowest_rank": busy.index(max(busy)),
    }


def describe(row: dict[str, Any]) -> str:
    """One line of a train row: loss, learning rate, gradient, speed, MFU, memory."""
    share, reached = row["mfu"], row["tflops"]
    parts = [
        f"loss {row['loss']:.4f}",
        *([f"ppl {row['perplexity']:.2f}"] if "perplexity" in row else []),
        f"lr {row['lr']:.2e}",
        f"grad {row['grad_norm']:.3g}",
        f"{row['step_s']:.3g} s/step",
        f"{row['tokens_per_s']:,.0f} tok/s",
        *([] if reached is None else [f"{reached:.3g} TFLOP/s"]),
        "MFU n/a" if share is None else f"MFU {share:.1%}",
        f"{row['memory_gb']:.2f} GB (peak {row['memory_peak_gb']:.2f})",
        *([f"slowest rank {row['slowest_rank']}"] if "slowest_rank" in row else []),
    ]
    return "  ".join(parts)


class RunLog:
    """Rows to a file, and to the console: a bar on a terminal, else a plain line a row.

    Args:
        rows: append-only log of the stage.
        title: name of the stage, before the bar.
        config: how many steps there are, and the trackers that get a copy of the numbers.
    """

    def __init__(self, rows: JsonLines, *, title: str, config: TrainingConfig) -> None:
        self.rows = rows
        trackers = config.trackers if rows.writes else ()
        self.trackers = Trackers(trackers, folder=rows.path.parent, run="trackers")
        self.title = title
        self.total_steps = config.max_steps
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        if console.is_terminal and self.rows.writes:
            self._bar = Bar(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[line]}"),
                console=console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(self.title, total=self.total_steps, line="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.trackers.close()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def start(self, row: dict[str, Any]) -> None:
        """First row of a start or restart, with what it is computed with."""
        facts = environment()
        known = {key: facts[key] for key in ("git_commit", "dirty", "versions", "time")}
        self.rows.append({"kind": "start", **row, **known})

    def train(self, row: dict[str, Any], *, eta_s: float) -> None:
        """One train row; ``eta_s`` is the time left in seconds."""
        self._keep("train", row)
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], line=describe(row))
        else:
            place = f"{self.title} {row['step']}/{self.total_steps}"
            log.info("%s  %s  ETA %s", place, describe(row), _clock(eta_s))

    def evaluation(self, row: dict[str, Any]) -> None:
        """One row of a validation pass."""
        self._keep("eval", row)
        facts = "  ".join(f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float))
        log.info("%s %d  validation %s", self.title, row["step"], facts)

    def _keep(self, kind: str, row: dict[str, Any]) -> None:
        """Write a row, and copy it to the trackers unless an earlier start has."""
        if self.rows.append({"kind": kind, **row}):
            self.trackers.log(kind, row)

    def saved(self, row: dict[str, Any]) -> None:
        """One row of a checkpoint."""
        self.rows.append({"kind": "save", **row})

    def sample(self, row: dict[str, Any]) -> None:
        """One row of generated text."""
        self.rows.append({"kind": "sample", **row})

    def stop(self, row: dict[str, Any]) -> None:
        """Last row of this process: finished, by signal, or diverged."""
        self.rows.append({"kind": "stop", **row, "time": utc_now()})


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
