"""Records of a training run: how far it is, one step, the first loss, and what it came to."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from modern_llm.errors import DivergedError
from modern_llm.runtime.logs import get_logger
from modern_llm.training.throughput import Work, mfu

log = get_logger(__name__)
WAY_OUT = "lower training.lr, or look at the data"  # of a run that diverged


@dataclass(frozen=True)
class FirstLoss:
    """What the loss must be before anything is learned; far off means a broken start.

    Attributes:
        expected: nats a unit, such as ln V or ln 2.
        tolerance: largest distance from it.
        why: where the number comes from, as the user is told.
        refuse: stop when it is off, instead of warning.
    """

    expected: float
    tolerance: float
    why: str
    refuse: bool = False

    def check(self, loss: float) -> None:
        """Log the first loss.

        Raises:
            DivergedError: it is off and ``refuse`` is set.
        """
        told = f"first loss {loss:.4f}, expected {self.expected:.4f} ({self.why})"
        if abs(loss - self.expected) <= self.tolerance:
            log.info("%s", told)
        elif self.refuse:
            raise DivergedError(f"{told}: off by more than {self.tolerance:g}, the start is broken")
        else:
            log.warning("%s: off by more than %g", told, self.tolerance)


def perplexity(loss: float) -> float:
    """Exponential of a loss in nats a token; infinite where no float can hold it."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) else math.inf


@dataclass
class Progress:
    """How far a run is; saved in every checkpoint."""

    step: int = 0  # finished optimizer steps
    tokens: int = 0
    units: int = 0
    scored: int = 0  # tokens at which the head computed
    seconds: float = 0.0  # in training steps, all processes of the run together
    busy_s: float = 0.0  # of this rank in loading and forward passes; the first rank's is saved
    steady_tokens: int = 0  # without each process's first step, which compiles and warms up
    steady_scored: int = 0
    steady_seconds: float = 0.0
    loss: float = math.nan  # of the last step
    best_step: int = -1  # of the validation passes; -1: none yet
    best_loss: float = math.inf
    restarts: int = 0


@dataclass(frozen=True)
class StepStats:
    """One optimizer step: loss and metrics are means over its units."""

    loss: float
    grad_norm: float
    lr: float
    units: int
    tokens: int
    scored: int
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class FitResult:
    """What a finished run comes to."""

    steps: int
    tokens: int
    passes: float  # over the training data
    seconds: float  # in training steps
    epoch_s: float  # of them, a pass
    tokens_per_s: float
    mfu: float | None
    peak_memory_gb: float
    final_loss: float
    best: dict[str, float] | None  # {"step", "loss"} of the best validation pass
    checkpoint: Path
    sha256: str
    restarts: int


def fit_result(
    progress: Progress, *, work: Work | None, peak: float | None, passes: float, **facts: Any
) -> FitResult:
    """What a finished run comes to.

    Args:
        progress: at its end.
        work: FLOPs of a token.
        peak: FLOP/s of the devices of all ranks.
        passes: over the training data.
        **facts: fields of the result that are known already.
    """
    p = progress
    seconds = p.steady_seconds or math.inf  # of a single step: no speed is known
    flops = work.flops(p.steady_tokens, p.steady_scored) if work else None
    return FitResult(
        steps=p.step,
        tokens=p.tokens,
        passes=passes,
        seconds=p.seconds,
        epoch_s=p.seconds / passes,
        tokens_per_s=p.steady_tokens / seconds,
        mfu=mfu(None if flops is None else flops / seconds, peak),
        final_loss=p.loss,
        best={"step": p.best_step, "loss": p.best_loss} if p.best_step >= 0 else None,
        restarts=p.restarts,
        **facts,
    )
