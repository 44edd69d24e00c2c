"""How one stage is optimised."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from modern_llm.config.schema import Component, Schema

DEFAULT_MIN_LR_RATIO = 0.1
Decay = Annotated[float, Field(ge=0, lt=1)]  # of a running mean


class TrainingConfig(Schema):
    """Optimizer steps of one stage. A row is one packed sequence, one pair, or one answer."""

    max_steps: PositiveInt
    batch_size: PositiveInt = 32  # rows of one optimizer step, over all micro-batches and ranks
    micro_batch_size: PositiveInt  # rows of one forward pass on one rank; default: batch_size
    seq_len: PositiveInt  # tokens of a row; default: model.max_seq_len (dpo: that of a pair)
    optimizer: Component = Component("adamw")
    lr: PositiveFloat = 3e-4
    # learning rate / lr when the last step is done
    min_lr_ratio: float = Field(DEFAULT_MIN_LR_RATIO, ge=0, le=1)
    schedule: Component = Component("cosine")
    warmup: NonNegativeInt | Annotated[float, Field(ge=0, lt=1)] = 0.02  # steps, or a share
    weight_decay: NonNegativeFloat = 0.1  # on matrices only
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"  # auto: what the device is fast in
    compile: bool = False
    activation_checkpointing: bool = False
    doc_mask: bool = False  # pretrain: documents packed in one row do not see each other
    distributed: Component = Component("none")  # none, ddp, zero1 or fsdp
    device: str = "auto"
    threads: PositiveInt | None = None  # CPU threads; default: torch's choice
    seed: NonNegativeInt = 0
    log_every: PositiveInt = 10  # steps
    grad_log_every: NonNegativeInt = 0  # steps, a multiple of log_every; 0: no statistics
    eval_every: NonNegativeInt = 0  # steps; 0: at the start and the end only
    save_every: NonNegativeInt = 0  # steps; 0: at the end only
    sample_every: NonNegativeInt = 0  # steps; 0: never
    keep_last: PositiveInt = 2  # checkpoints kept beside the best of those saved
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()  # beside metrics.jsonl

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        if isinstance(value, dict) and "micro_batch_size" not in value:
            value = {**value, "micro_batch_size": value.get("batch_size", 32)}
        return value

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            fits = [m for m in range(1, self.batch_size + 1) if self.batch_size % m == 0]
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} must divide "
                f"batch_size={self.batch_size}: use one of {fits[-6:]}"
            )
        if self.grad_log_every % self.log_every:
            raise ValueError(
                f"grad_log_every={self.grad_log_every} must be a multiple of "
                f"log_every={self.log_every}: its numbers are in the rows of those steps"
            )
        return self

    @field_validator("warmup", mode="before")
    @classmethod
    def _check_share(cls, value: Any) -> Any:
        if isinstance(value, float) and value >= 1:  # else it would be taken as steps
            raise ValueError(
                f"warmup={value} is a share of the steps, which must be below 1; write a number of "
                "steps without a point"
            )
        return value

    @model_validator(mode="after")
    def _check_floor(self) -> Self:
        unused = self.min_lr_ratio not in (DEFAULT_MIN_LR_RATIO, 1.0)  # 1: what constant does
        if self.schedule.name == "constant" and unused:
            raise ValueError(
                f"min_lr_ratio={self.min_lr_ratio} has no effect with schedule=constant; "
                "leave it out, or set it to 1"
            )
        return self
