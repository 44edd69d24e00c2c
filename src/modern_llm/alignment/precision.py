"""From ``precision=auto`` to what the machine is fast in, before anything is hashed or recorded."""

from typing import TypeVar

from modern_llm.config import TRAINED_STAGES, EvalConfig, PipelineConfig, Schema, TrainingConfig
from modern_llm.errors import ConfigError
from modern_llm.runtime.devices import resolve_device, resolve_precision

S = TypeVar("S", TrainingConfig, EvalConfig)


def concrete(config: PipelineConfig) -> PipelineConfig:
    """``config`` with every ``precision=auto`` replaced by what the device is fast in.

    So a run's record, and its hash, say what was computed. A device that is not here is left to
    the preflight.
    """
    sections: dict[str, Schema] = {"eval": _concrete(config.eval)}
    for name in TRAINED_STAGES:
        stage = config.stage(name)
        sections[name] = stage.model_copy(update={"training": _concrete(stage.training)})
    return config.model_copy(update=sections)


def _concrete(section: S) -> S:
    try:
        precision = resolve_precision(section.precision, resolve_device(section.device))
    except ConfigError:
        return section
    return section.model_copy(update={"precision": precision})
