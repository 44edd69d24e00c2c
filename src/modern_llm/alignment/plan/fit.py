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
MOST_GPUS = 4096  # beyond, no more are looked for
NO_DROPOUT = ("dpo",)  # the policy is compared with its reference without
MASKED = ("sft", "dpo")  # rows of several texts that do not see each other
NO_CHUNKS = ("dpo", "verifier")


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
        self.precision = self.training.precision
        if self.precision == "auto":
            self.precision = machine.card.precision
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
            scored=scored,
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

    def division_problem(self) -> str | None:
        """Why the batch does not divide over the GPUs, with sizes that do."""
        gpus, batch = self.machine.gpus, self.training.batch_size
        micro = self.training.micro_batch_size
        if batch % (micro * gpus) == 0:
            return None
        told = (
            f"{self.stage}.training: batch_size={batch} is no multiple of micro_batch_size={micro} "
            f"x {gpus} GPUs; use "
        )
        ways = []
        if fits := self.micro_batches(gpus):
            ways.append(f"micro_batch_size {', '.join(map(str, fits[-6:]))}")
        unit = micro * gpus
        near = sorted({max(1, batch // unit) * unit, -(-batch // unit) * unit})
        ways.append(f"batch_size {' or '.join(map(str, near))}")
        if fewer := [g for g in range(gpus - 1, 0, -1) if batch % (micro * g) == 0][:1]:
            ways.append(f"{fewer[0]} GPU{'s' * (fewer[0] > 1)}")
        return told + ", or ".join(ways)

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
    named = training.distributed
    name = named if isinstance(named, str) else named.name
    options = {} if isinstance(named, str) else named.options
    return name, str(options.get("sharding", "full")) if name == "fsdp" else ""


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
        """Every engine that can be had on ``gpus`` GPUs."""
        gpus = self.machine.gpus if gpus is None else gpus
        per_node = self.machine.per_node if gpus == self.machine.gpus else min(8, gpus)
        if gpus == 1:
            return [Share("none")]
        return [
            Share(engine, sharding, gpus, per_node)
            for engine, sharding in SHARES
            if sharding != "hybrid" or gpus > per_node
        ]

    @cached_property
    def choice(self) -> Choice | None:
        """The simplest engine that fits every stage, activations computed again only if they must.

        ``None``: nothing fits on this machine.
        """
        asked = any(stage.training.activation_checkpointing for stage in self.stages)
        for checkpointing in (asked,) if asked else (False, True):
            for share in self.shares():
                micro = {s.stage: s.largest(share, checkpointing=checkpointing) for s in self.stages}
                if all(micro.values()):
                    found = {stage: m for stage, m in micro.items() if m is not None}
                    return Choice(share, checkpointing, found)
        return None

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
            if told := stage.division_problem():
                found.append(ConfigError(told))
            if told := self._memory_problem(stage):
                found.append(ConfigError(told))
        return found

    def _memory_problem(self, stage: StageFit) -> str | None:
        """Why a stage does not fit as it is configured, and what would."""
        training, share = stage.training, self.planned(stage)
        micro, again = training.micro_batch_size, training.activation_checkpointing
        if stage.fits(share, micro, checkpointing=again):
            return None
        taken = stage.footprint(share, micro, checkpointing=again).total
        ways = self._ways_out(stage, share)
        if not ways:
            ways = ["nothing of this package: see docs/scaling.md on tensor and pipeline parallelism"]
        return (
            f"{stage.stage}: {share} with micro_batch_size={micro}"
            f"{' and activation_checkpointing' if again else ''} takes {taken / 1e9:,.1f} GB of the "
            f"{stage.machine.usable_bytes / 1e9:,.1f} GB that can be used on {self.machine.name}; "
            f"this would fit: {'; '.join(ways)}"
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
        """The smallest doubling of the GPUs at which the stage fits, as it is or at all."""
        gpus, batch = self.machine.gpus * 2, stage.training.batch_size
        while gpus <= MOST_GPUS:
            share, rows = self.shares(gpus)[-1], max(1, -(-batch // gpus))
            for checkpointing in (False, True):
                if stage.fits(share, 1 if checkpointing else rows, checkpointing=checkpointing):
                    told = ", micro_batch_size=1 and activation_checkpointing=true"
                    larger = f" and batch_size={gpus}" if batch < gpus else ""
                    return f"{gpus} GPUs with distributed={share}{told * checkpointing}{larger}"
            gpus *= 2
        return None


