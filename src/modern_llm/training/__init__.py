"""Layer 3: one Trainer for every stage, objectives, optimizers, schedules, checkpoints."""

from modern_llm.models.loss import token_loss_sum
from modern_llm.models.weights import model_weights
from modern_llm.training.checkpoint import (
    Checkpoint,
    load_model_weights,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from modern_llm.training.objectives import (
    LMObjective,
    Objective,
    Terms,
    with_balance_loss,
)
from modern_llm.training.optim import OPTIMIZERS, Optimizers, build_optimizers
from modern_llm.training.records import FirstLoss, FitResult
from modern_llm.training.retention import best_checkpoint, list_checkpoints, newest_good, prune
from modern_llm.training.schedule import SCHEDULES, Schedule
from modern_llm.training.trainer import Trainer
from modern_llm.training.validation import mean_loss

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Checkpoint",
    "FirstLoss",
    "FitResult",
    "LMObjective",
    "Objective",
    "Optimizers",
    "Schedule",
    "Terms",
    "Trainer",
    "best_checkpoint",
    "build_optimizers",
    "list_checkpoints",
    "load_model_weights",
    "mean_loss",
    "model_weights",
    "newest_good",
    "prune",
    "read_checkpoint",
    "token_loss_sum",
    "verify_checkpoint",
    "with_balance_loss",
    "write_checkpoint",
]
