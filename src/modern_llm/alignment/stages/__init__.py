"""One file a stage; importing this package registers them all."""

from modern_llm.alignment.stages import dpo, evaluate, pretrain, sft, verifier
from modern_llm.alignment.stages.base import STAGES, Stage, TrainedStage

__all__ = ["STAGES", "Stage", "TrainedStage", "dpo", "evaluate", "pretrain", "sft", "verifier"]
