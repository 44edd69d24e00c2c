"""Which engine and micro-batch fit on a machine, and what would where none does."""

from dataclasses import dataclass
from functools import cached_property

from modern_llm.alignment.plan.machine import Machine
from modern_llm.config import PipelineConfig, TrainingConfig
from modern_llm.errors import ConfigError
from modern_llm.models.memory import FP32, Activations, Pass, activations
from modern_llm.training.memory import Footprint, Share, State

HALF = 2  # bytes of bf16 and fp16
# From what talks least between GPUs to what needs least memory.
SHARES = (("ddp", ""), ("zero1", ""), ("fsdp", "grad_op"), ("fsdp", "hybrid"), ("fsdp", "full"))
ENOUGH_TOKENS = 4096  # at once: fewer leave a large GPU waiting for memory
NODE = 8  # GPUs of a machine, where more are looked for than there are
MOST_GPUS = 4096  # beyond, no more are looked for
NO_DROPOUT = ("dpo",)  # the policy is compared with its reference without
MASKED = ("sft", "dpo")  # rows of several texts that do not see each other


class StageFit:
    """One trained stage on one machine.

    Args:
        config: the whole run.
        stage: which of its stages.
        machine: where it is to train.
    """

    def __init__(self, config: PipelineConfig, stage: str, machine: Machine) -> None:
        self.config, self.stage, self.machine = config, stage, machine
        self.training: TrainingConfig = config.stage(stage).training
        given = self.training.precision
        self.precision: str = machine.card.precision if given == "auto" else given
        self.number = FP32 if self.precision == "fp32" else HALF

    @cached_property
    def state(self) -> State:
        """Parameters, gradients and moments."""
        return State(self.config.model, self.training)

    def activations(self, micro: int) -> Activations:
        """What ``micro`` rows keep."""
        training, stage = self.training, self.stage
        scored = None
        if stage == "dpo":
            scored = 2 * self.config.dpo.max_answer_tokens * micro
        step = Pass(
            micro, training.seq_len, self.number,
            masked=stage in MASKED or training.doc_mask, dropout=stage not in NO_DROPOUT,
            scored=scored, loss_chunk=training.loss_chunk,
        )  # fmt: skip
        return activations(self.config.model, step)

    def footprint(self, share: Share, micro: int, *, checkpointing: bool) -> Footprint:
        """Memory of the fullest GPU."""
        return self.state.footprint(
            share, self.activations(micro), number=self.number, checkpointing=checkpointing
        )

    def fits(self, share: Share, micro: int, *, checkpointing: bool) -> bool:
        """Whether a step stays within the usable memory."""
        taken = self.footprint(share, micro, checkpointing=checkpointing).total
        return taken <= self.machine.usable_bytes

    def micro_batches(self, gpus: int) -> list[int]:
        """Micro-batches that divide the batch over ``gpus``, smallest first."""
        rows, rest = divmod(self.training.batch_size, gpus)
        return [] if rest or not rows else [m for m in range(1, rows + 1) if rows % m == 0]

    def largest(self, share: Share, *, checkpointing: bool) -> int | None:
        """The largest micro-batch that fits and divides the batch, if there is one."""
        for micro in reversed(self.micro_batches(share.gpus)):
            if self.fits(share, micro, checkpointing=checkpointing):
                return micro
        return None

    def division_problem(self, share: Share) -> str | None:
        """Why the batch does not divide over the GPUs, with sizes that do, and fit on ``share``."""
        gpus, batch = self.machine.gpus, self.training.batch_size
        micro, again = self.training.micro_batch_size, self.training.activation_checkpointing
        unit = micro * gpus
        if batch % unit == 0:
            return None
        divide = self.micro_batches(gpus)
        fit = [m for m in divide if self.fits(share, m, checkpointing=again)] or divide
        near = sorted({max(1, batch // unit) * unit, -(-batch // unit) * unit})
        ways = [f"micro_batch_size {', '.join(map(str, fit[-6:]))}"] if fit else []
        ways.append(f"batch_size {' or '.join(map(str, near))}")
        if fewer := [g for g in range(gpus - 1, 0, -1) if batch % (micro * g) == 0][:1]:
            ways.append(f"{fewer[0]} GPU{'s' * (fewer[0] > 1)}")
        return (
            f"{self.stage}.training: batch_size={batch} is no multiple of micro_batch_size={micro} "
            f"x {gpus} GPUs; use {', or '.join(ways)}"
        )

    def hours(self, flops: float) -> float | None:
        """Hours of all GPUs together at work, or ``None``: the peak is not known."""
        peak = self.machine.card.peak_flops(self.precision)
        if peak is None:
            return None
        return flops / (peak * self.machine.mfu * self.machine.gpus) / 3600


@dataclass(frozen=True)
class Choice:
    """What is recommended for all stages.

    Attributes:
        share: engine.
        checkpointing: whether activations have to be computed again.
        micro: micro-batch by stage.
    """

    share: Share
    checkpointing: bool
    micro: dict[str, int]

    def overrides(self, config: PipelineConfig, stages: list[str]) -> list[str]:
        """What to add on the command line to have it."""
        wanted = []
        given = {engine_of(config.stage(stage).training) for stage in stages}
        if given != {(self.share.engine, self.share.sharding)}:
            wanted.append(f"training.distributed={self.share.engine}")
            if self.share.sharding not in ("", "full"):
                wanted.append(f"training.distributed.sharding={self.share.sharding}")
        for stage, micro in self.micro.items():
            training = config.stage(stage).training
            if training.micro_batch_size != micro:
                wanted.append(f"{stage}.training.micro_batch_size={micro}")
            if self.checkpointing and not training.activation_checkpointing:
                wanted.append(f"{stage}.training.activation_checkpointing=true")
        return wanted


def engine_of(training: TrainingConfig) -> tuple[str, str]:
    """Engine and sharding of a config."""
    engine = training.distributed
    return engine.name, engine.options.get("sharding", "full") if engine.name == "fsdp" else ""


class Fit:
    """All trained stages of a run on one machine.

    Args:
        config: the whole run.
        stages: those that are trained.
        machine: where.
    """

    def __init__(self, config: PipelineConfig, stages: list[str], machine: Machine) -> None:
        self.config, self.machine = config, machine
        self.stages = [StageFit(config, stage, machine) for stage in stages]

    def shares(self, gpus: int | None = None) -> list[Share]:
        """Every engine that can be had on ``gpus`` GPUs; default: all of the machine."""
        gpus = self.machine.gpus if gpus is None else gpus
        per_node = min(self.machine.per_node if gpus == self.machine.gpus else NODE, gpus)
        if gpus == 1:
            return [Share("none")]
        halves = any(stage.precision == "fp16" for stage in self.stages)  # not under fsdp
        return [
            Share(engine, sharding, gpus, per_node)
            for engine, sharding in SHARES
            if (sharding != "hybrid" or gpus > per_node) and not (engine == "fsdp" and halves)
        ]

    @cached_property
    def choice(self) -> Choice | None:
        """What fits all stages: the simplest engine that keeps the GPUs busy, else the fullest one.

        Activations are computed again only if nothing fits without. ``None``: nothing fits.
        """
        asked = any(stage.training.activation_checkpointing for stage in self.stages)
        for checkpointing in (asked,) if asked else (False, True):
            found = [c for share in self.shares() if (c := self._with(share, checkpointing))]
            if found:
                busy = [choice for choice in found if self._is_busy(choice)]
                return (
                    busy[0] if busy else max(found, key=lambda choice: sum(choice.micro.values()))
                )
        return None

    def _with(self, share: Share, checkpointing: bool) -> Choice | None:
        """The largest micro-batches under one engine, if every stage has one."""
        sizes = [stage.largest(share, checkpointing=checkpointing) for stage in self.stages]
        found = {s.stage: m for s, m in zip(self.stages, sizes, strict=True) if m}
        return Choice(share, checkpointing, found) if len(found) == len(self.stages) else None

    def _is_busy(self, choice: Choice) -> bool:
        """Whether every stage has enough tokens at once, or all rows that a GPU gets."""
        return all(
            micro * stage.training.seq_len >= ENOUGH_TOKENS
            or micro == stage.training.batch_size // choice.share.gpus
            for stage, micro in zip(self.stages, choice.micro.values(), strict=True)
        )

    def planned(self, stage: StageFit) -> Share:
        """The engine of the config; where it leaves that open, the recommended or the last one."""
        engine, sharding = engine_of(stage.training)
        if engine == "none" and self.machine.gpus > 1:
            return self.choice.share if self.choice else self.shares()[-1]
        gpus = self.machine.gpus
        return Share(engine, sharding, gpus, self.machine.per_node)

    @cached_property
    def problems(self) -> list[ConfigError]:
        """What cannot be on this machine, each with ways out."""
        found = []
        for stage in self.stages:
            told = stage.division_problem(self.planned(stage)) or self._memory_problem(stage)
            if told:
                found.append(ConfigError(told))
        return found

    def _memory_problem(self, stage: StageFit) -> str | None:
        """Why a stage does not fit as it is configured, and what would."""
        training, share = stage.training, self.planned(stage)
        micro, again = training.micro_batch_size, training.activation_checkpointing
        if stage.fits(share, micro, checkpointing=again):
            return None
        taken = stage.footprint(share, micro, checkpointing=again).total
        ways = self._ways_out(stage, share) or ["nothing of this package (docs/scaling.md)"]
        checkpointing = " and activation_checkpointing" if again else ""
        usable = self.machine.usable_bytes / 1e9
        return (
            f"{stage.stage}: {share} with micro_batch_size={micro}{checkpointing} takes "
            f"{taken / 1e9:,.1f} GB of the {usable:,.1f} GB that can be used on "
            f"{self.machine.name}; this would fit: {'; '.join(ways)}"
        )

    def _ways_out(self, stage: StageFit, share: Share) -> list[str]:
        """Changes that make a stage fit, each alone if one does, else together."""
        again, micro = stage.training.activation_checkpointing, stage.training.micro_batch_size
        ways = []
        if smaller := stage.largest(share, checkpointing=again):
            ways.append(f"micro_batch_size={smaller}")
        if not again and stage.fits(share, micro, checkpointing=True):
            ways.append("activation_checkpointing=true")
        others = [other for other in self.shares() if other != share]
        for checkpointing in (False, True) if not again else (True,):
            if ways:
                break
            for other in (share, *others):
                if size := stage.largest(other, checkpointing=checkpointing):
                    told = " with activation_checkpointing=true" * (checkpointing and not again)
                    ways.append(f"distributed={other} with micro_batch_size={size}{told}")
                    break
        if more := self._more_gpus(stage):
            ways.append(more)
        return ways

    def _more_gpus(self, stage: StageFit) -> str | None:
        """The smallest doubling of the GPUs at which the stage fits."""
        gpus, batch = self.machine.gpus * 2, stage.training.batch_size
        again = stage.training.activation_checkpointing
        while gpus <= MOST_GPUS:
            share = self.shares(gpus)[-1]
            rows = -(-batch // gpus)
            for checkpointing, micro in ((again, rows), (again, 1), (True, 1)):
                if stage.fits(share, micro, checkpointing=checkpointing):
                    told = [f"{gpus} GPUs with distributed={share}", f"micro_batch_size={micro}"]
                    told += ["activation_checkpointing=true"] * (checkpointing and not again)
                    told += [f"batch_size={gpus}"] * (batch < gpus)
                    return ", ".join(told)
            gpus *= 2
        return None
