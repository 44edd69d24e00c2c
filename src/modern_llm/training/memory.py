"""Memory of a GPU that trains: what each engine leaves on the fullest rank, part by part.

Parameters, gradients and moments are counted tensor by tensor, as the engine shares them out
(`engines`); what one micro-batch keeps is summed up in `modern_llm.models.memory`. All in bytes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from modern_llm.config import ModelConfig, TrainingConfig
from modern_llm.models import ModernDecoderLM
from modern_llm.models.memory import FP32, Activations
from modern_llm.training.optim import build_optimizers


@dataclass(frozen=True)
class Share:
    """Which engine, over how many GPUs.

    Attributes:
        engine: ``none``, ``ddp``, ``zero1`` or ``fsdp``.
        sharding: of ``fsdp``: ``full``, ``grad_op`` or ``hybrid``.
        gpus: ranks in all.
        per_node: ranks of a machine.
    """

    engine: str
    sharding: str = ""
    gpus: int = 1
    per_node: int = 8

    @property
    def parts(self) -> int:
        """Ranks that one copy of the state is spread over."""
        return min(self.per_node, self.gpus) if self.sharding == "hybrid" else self.gpus

    def __str__(self) -> str:
        return f"{self.engine} {self.sharding}".strip()


@dataclass(frozen=True)
class Footprint:
    """Bytes on the fullest rank at the most expensive moment of a step.

    Attributes:
        parameters: float32.
        gradients: float32.
        optimizer: moments.
        activations: kept for the backward.
        loss: logits, and what their gradient takes.
        buffers: copies of weights in the precision of products, parameters and gradients that are
            put together for a block.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    buffers: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        state = self.parameters + self.gradients + self.optimizer
        return state + self.activations + self.loss + self.buffers


@dataclass(frozen=True)
class Tensors:
    """One parameter and its moments.

    Attributes:
        numbers: of the parameter.
        rows: size of its first axis, along which it is shared out.
        moments: bytes of the optimizer for it.
        part: which of the optimizers has it.
        block: index of its block; ``None``: around the blocks.
        multiplied: a matrix, of which autocast makes a copy.
    """

    numbers: int
    rows: int
    moments: int
    part: int
    block: int | None
    multiplied: bool

    def share(self, parts: int) -> float:
        """Part of it on the first rank: whole rows, rounded up."""
        return math.ceil(self.rows / parts) / self.rows


class State:
    """Parameters, gradients and moments of one model and optimizer, built without memory.

    Args:
        config: of the model.
        training: names the optimizer.
    """

    def __init__(self, config: ModelConfig, training: TrainingConfig) -> None:
        with torch.device("meta"):
            model = ModernDecoderLM(config)
        self.head = config.vocab_size * config.d_model
        self.tied = config.tie_embeddings
        moments = _moments(model, training)
        self.tensors = [
            Tensors(p.numel(), len(p), *moments[id(p)], *_place(name, p))
            for name, p in model.named_parameters()
        ]

    @cached_property
    def parameters(self) -> int:
        """Numbers of the model."""
        return sum(t.numbers for t in self.tensors)

    @cached_property
    def moments(self) -> int:
        """Bytes of the whole optimizer state."""
        return sum(t.moments for t in self.tensors)

    def weights_bytes(self) -> int:
        """Of a checkpoint's weights."""
        return FP32 * self.parameters

    def checkpoint_bytes(self) -> int:
        """Of a checkpoint that training goes on from; rank 0 has as much in its host memory."""
        return self.weights_bytes() + self.moments

    def on_rank(self, share: Share) -> tuple[float, float, float]:
        """Parameters, gradients and moments on the fullest rank."""
        if share.engine == "fsdp":
            parts = share.parts
            own = sum(FP32 * t.numbers * t.share(parts) for t in self.tensors)
            return own, own, sum(t.moments * t.share(parts) for t in self.tensors)
        whole = float(FP32 * self.parameters)
        if share.engine == "zero1":
            return whole, whole, max(self._greedy(share.gpus))
        return whole, whole, float(self.moments)

    def _greedy(self, ranks: int) -> list[float]:
        """Moments by rank: each parameter, the largest first, goes to the rank with the fewest.

        As `torch.distributed.optim.ZeroRedundancyOptimizer` shares them out, each optimizer for
        itself.
        """
        total = [0.0] * ranks
        for part in {t.part for t in self.tensors}:
            numbers = [0] * ranks
            of_part = (t for t in self.tensors if t.part == part)
            for tensor in sorted(of_part, key=lambda t: t.numbers, reverse=True):
                rank = numbers.index(min(numbers))
                numbers[rank] += tensor.numbers
                total[rank] += tensor.moments
        return total

    def buffers(
        self, share: Share, moment: str, *, number: int, checkpointing: bool, reduce: int = FP32
    ) -> float:
        """Working memory of the engine, and the copies of weights that autocast makes.

        Args:
            share: the engine.
            moment: ``forward``, ``loss`` or ``block``, as in `Activations.moments`.
            number: bytes of a number in matrix products.
            checkpointing: a block's copies are dropped when its forward is done.
            reduce: bytes of a number when gradients are summed over ranks.
        """
        head = float(number * self.head if number < FP32 else 0)
        blocks = self._by_block()
        if share.engine != "fsdp":
            if number == FP32:
                return 0.0
            if checkpointing and moment == "loss":
                return head
            if checkpointing and moment == "block":
                return float(number * max(blocks.values()))
            copied = sum(t.numbers for t in self.tensors if t.multiplied)
            return number * copied + head * self.tied
        whole, largest = sum(blocks.values()), max(blocks.values())
        stays = float(number * whole if share.sharding == "grad_op" else 0)
        if moment != "block":
            return head + stays
        # What is around the blocks with its gradient; of a block its gradient, as it is computed
        # and as it is summed up; and this block, the next, and the message that it is in.
        around = 2 * FP32 * (self.parameters - whole)
        return around + (number + reduce) * largest + (stays or 3.0 * number * largest)

    def _by_block(self) -> dict[int, int]:
        blocks: dict[int, int] = {}
        for tensor in self.tensors:
            if tensor.block is not None:
                blocks[tensor.block] = blocks.get(tensor.block, 0) + tensor.numbers
        return blocks

    def footprint(
        self, share: Share, step: Activations, *, number: int, checkpointing: bool
    ) -> Footprint:
        """All parts together.

        Args:
            share: the engine.
            step: what a micro-batch keeps.
            number: bytes of a number in matrix products.
            checkpointing: only the blocks' inputs are kept.
        """
        state, found = self.on_rank(share), []
        for moment, (kept, loss) in step.moments(checkpointing=checkpointing).items():
            buffers = self.buffers(share, moment, number=number, checkpointing=checkpointing)
            found.append(Footprint(*state, kept, loss, buffers))
        return max(found, key=lambda parts: parts.total)


def _place(name: str, parameter: nn.Parameter) -> tuple[int | None, bool]:
    """Block of a parameter, and whether it is multiplied by."""
    kind, *rest = name.split(".")
    looked_up = kind in ("embedding", "position")
    return (int(rest[0]) if kind == "blocks" else None), parameter.ndim > 1 and not looked_up


def _moments(model: nn.Module, training: TrainingConfig) -> dict[int, tuple[int, int]]:
    """Bytes of each parameter's moments, and which optimizer has it: one step, without memory."""
    optimizers = build_optimizers(model, training)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizers.step()
    return {
        id(p): (_bytes(part.state[p].values()), i)
        for i, part in enumerate(optimizers.parts)
        for group in part.param_groups
        for p in group["params"]
    }


def _bytes(state: Iterable[object]) -> int:
    tensors = (x for x in state if isinstance(x, torch.Tensor) and x.ndim)
    return sum(x.numel() * x.element_size() for x in tensors)
