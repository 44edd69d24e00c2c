"""The machine that a plan is for: this one, or GPUs by name and number."""

from dataclasses import dataclass, replace

from modern_llm.errors import ConfigError
from modern_llm.training.gpus import GPU, gpu_named
from modern_llm.training.throughput import ASSUMED_MFU

USABLE = 0.9  # of a GPU's memory: CUDA, NCCL and what lies between tensors take the rest


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind.

    Attributes:
        name: short name of the card.
        card: the card.
        gpus: in all.
        per_node: of one machine; no machine has fewer, but for a single one.
        mfu: share of the peak that hours are counted with: an assumption.
    """

    name: str
    card: GPU
    gpus: int
    per_node: int
    mfu: float

    @property
    def nodes(self) -> int:
        """Machines."""
        return -(-self.gpus // self.per_node)

    @property
    def usable_bytes(self) -> float:
        """Memory of a GPU that a step may take."""
        return USABLE * self.card.memory_gb * 1e9

    def of(self, gpus: int) -> "Machine":
        """The same with another number of GPUs."""
        return replace(self, gpus=gpus)


def machine_of(
    gpu: str | None, gpus: int | None, per_node: int | None, mfu: float | None
) -> Machine | None:
    """The machine that the flags name; ``None``: none is named, the plan is for this machine.

    Raises:
        ConfigError: an unknown card, a number that cannot be, or flags without ``--gpu``.
    """
    given = {"--gpus": gpus, "--gpus-per-node": per_node, "--mfu": mfu}
    if gpu is None:
        if extra := [flag for flag, value in given.items() if value is not None]:
            raise ConfigError(f"{', '.join(extra)}: of which card? give --gpu NAME, such as h100")
        return None
    name, card = gpu_named(gpu)
    count, per_node = 1 if gpus is None else gpus, 8 if per_node is None else per_node
    mfu = ASSUMED_MFU if mfu is None else mfu
    problems = [
        f"--{flag}={value}: at least 1"
        for flag, value in (("gpus", count), ("gpus-per-node", per_node))
        if value < 1
    ]
    if not 0 < mfu <= 1:
        problems.append(f"--mfu={mfu}: a share of the peak, above 0 and at most 1")
    if not problems and count > per_node and count % per_node:
        down, up = count // per_node * per_node, -(-count // per_node) * per_node
        problems.append(
            f"--gpus={count} does not fill nodes of {per_node}: use {down} or {up}, or another "
            "--gpus-per-node"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return Machine(name, card, count, min(per_node, count), mfu)
