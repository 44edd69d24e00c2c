"""What the ranks of the tests run; `rank_server` calls these functions in forked processes."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modern_llm import cli
from modern_llm.alignment.pipeline import concrete
from modern_llm.alignment.stages import STAGES
from modern_llm.config import PipelineConfig, load_config
from modern_llm.errors import StoppedBySignal
from modern_llm.runtime.ranks import group, joined, launched_ranks
from modern_llm.runtime.seeding import seed_everything
from modern_llm.training.trainer import Trainer


def command(arguments: list[str]) -> int:
    """One command line."""
    return cli.main(arguments)


def configured(config: str, overrides: list[str]) -> PipelineConfig:
    return concrete(load_config(config, overrides))


def train(config: str, cases: list[dict[str, Any]]) -> None:
    """Train stages one after the other, without scoring them; see `train_case`."""
    with joined(launched_ranks(), timeout_s=60.0):
        for case in cases:
            train_case(config, **case)


def train_case(
    config: str,
    *,
    stage: str,
    run: str,
    parent: str | None = None,
    overrides: list[str],
    stops: list[int] | None = None,
    ends: bool = True,
) -> None:
    """Train one stage, from a parent's checkpoint, stopped by a signal after some steps.

    The random state before each start is another one: what is needed of it must be restored.

    Args:
        ends: whether it is started again after the last stop.
    """
    given = configured(config, overrides)
    for start, stop in enumerate([*(stops or ()), *([None] if ends else [])]):
        seed_everything(1000 * start + group().ranks.rank)
        made = STAGES[stage](given, Path(run), parent and Path(parent))
        try:
            with stopped_after(stop):
                made.train()
        except StoppedBySignal:
            assert stop is not None
        else:
            assert stop is None


class stopped_after:  # noqa: N801 - read as a phrase
    """The last rank sends itself SIGUSR1 inside a step."""

    def __init__(self, stop: int | None) -> None:
        self.stop, self.step = stop, Trainer.train_step

    def __enter__(self) -> None:
        train_step, stop, last = self.step, self.stop, group().world_size - 1

        def signalled(self: Trainer, batches: Any) -> Any:
            if self.progress.step + 1 == stop and group().ranks.rank == last:
                os.kill(os.getpid(), signal.SIGUSR1)
            return train_step(self, batches)

        Trainer.train_step = signalled  # type: ignore[method-assign]

    def __exit__(self, *told: object) -> None:
        Trainer.train_step = self.step  # type: ignore[method-assign]


Fault = Callable[..., None]
