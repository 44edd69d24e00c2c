"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to resume wrong.

A registered schedule maps the progress after warm-up, in [0, 1), to a factor of the peak rate.
Warm-up is linear and comes first, whatever the schedule.
"""

import math
from typing import Any

from modern_llm.config import TrainingConfig
from modern_llm.errors import ConfigError
from modern_llm.registry import Registry

SCHEDULES = Registry("schedule")


@SCHEDULES.register("constant")
def constant(progress: float, floor: float) -> float:
    """Stay at the peak rate; ``floor`` is not used."""
    return 1.0


@SCHEDULES.register("linear")
def linear(progress: float, floor: float) -> float:
    """Fall from 1 to ``floor`` on a straight line."""
    return 1.0 - (1.0 - floor) * progress


@SCHEDULES.register("cosine")
def cosine(progress: float, floor: float) -> float:
    """Fall from 1 to ``floor`` on half a cosine (Loshchilov & Hutter, arXiv:1608.03983, eq. 5)."""
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


@SCHEDULES.register("wsd")
def wsd(progress: float, floor: float, *, decay: float = 0.2) -> float:
    """Warm up, stay, decay: stay at 1, then fall to ``floor`` on a line (arXiv:2404.06395, eq. 1).

    Args:
        progress: share of the steps after warm-up that are done.
        floor: factor at the end.
        decay: share of the steps after warm-up in which the rate falls, in (0, 1].
    """
    stay = 1.0 - decay
    return 1.0 if progress <= stay else linear((progress - stay) / decay, floor)


class Schedule:
    """Factor of the peak learning rate at each optimizer step of a training config.

    Args:
        config: ``schedule``, ``warmup`` (steps as an int, share of ``max_steps`` as a float),
            ``max_steps`` and ``min_lr_ratio`` are read.

    Raises:
        ConfigError: unknown schedule or option, or a decay share outside (0, 1].
    """

    def __init__(self, config: TrainingConfig) -> None:
        options: dict[str, Any] = dict(config.schedule.options)
        SCHEDULES.check(config.schedule.name, options)
        if not 0.0 < options.get("decay", 1.0) <= 1.0:
            raise ConfigError(f"schedule decay={options['decay']} must be in (0, 1]")
        self._shape = SCHEDULES[config.schedule.name]
        self._options = options
        self._floor = config.min_lr_ratio
        self.total_steps = config.max_steps
        share = isinstance(config.warmup, float)
        wanted = round(config.warmup * config.max_steps) if share else int(config.warmup)
        self.warmup_steps = min(wanted, config.max_steps)

    def factor(self, step: int) -> float:
        """Factor for the update that follows ``step`` finished updates (the first is step 0).

        Rises as ``(step + 1) / warmup_steps``, then follows the schedule's shape.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / left)
        return float(self._shape(progress, self._floor, **self._options))
