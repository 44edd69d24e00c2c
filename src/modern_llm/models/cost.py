"""Parameters and floating-point operations, added up from the parts of a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

ATTENTION = ("projections", "attention")  # matrices around it; scores and the mixing of values
FEED_FORWARD = ("ffn", "experts", "router")
HEAD = ("head", "value head")


@dataclass(frozen=True)
class Cost:
    """What one part, or a whole model, costs.

    FLOPs are those of the matrix multiplications (a multiply-add is two), per token of a sequence
    of the length asked for, forward only. Attention is counted as
    ``torch.utils.flop_counter`` counts it: every query against all ``S = T`` keys, although a
    causal mask uses half of them. A training step costs three times as much: the gradient of a
    product is two products. (The fused attention kernel recomputes one more in its backward,
    which is not counted, as usual for MFU: arXiv:2204.02311, app. B.)

    Attributes:
        params: all trained numbers, tied ones once.
        active_params: those that one token uses; fewer than ``params`` with experts.
        embedding_params: rows looked up by token or position; part of ``params``.
        flops_per_token_forward: as above.
        parts: forward FLOPs per token by name of the part.
    """

    params: int = 0
    active_params: int = 0
    embedding_params: int = 0
    flops_per_token_forward: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def flops_per_token_training(self) -> float:
        """Forward and backward: three times the forward."""
        return 3.0 * self.flops_per_token_forward

    @property
    def attention_flops(self) -> float:
        """Forward FLOPs per token of attention, its matrices included."""
        return sum(self.parts.get(name, 0.0) for name in ATTENTION)

    @property
    def feed_forward_flops(self) -> float:
        """Forward FLOPs per token of the feed-forward, or of the experts and their router."""
        return sum(self.parts.get(name, 0.0) for name in FEED_FORWARD)

    @property
    def head_flops(self) -> float:
        """Forward FLOPs per token whose logits, or score, are computed."""
        return sum(self.parts.get(name, 0.0) for name in HEAD)

    def __add__(self, other: "Cost") -> "Cost":
        names = [*self.parts, *(name for name in other.parts if name not in self.parts)]
        return Cost(
            self.params + other.params,
            self.active_params + other.active_params,
            self.embedding_params + other.embedding_params,
            self.flops_per_token_forward + other.flops_per_token_forward,
            {name: self.parts.get(name, 0.0) + other.parts.get(name, 0.0) for name in names},
        )


def part_cost(name: str, module: nn.Module, *, flops: float = 0.0) -> Cost:
    """Cost of a part whose every parameter is active: its parameters and ``flops`` per token."""
    count = sum(parameter.numel() for parameter in module.parameters())
    return Cost(count, count, 0, flops, {name: flops} if flops else {})
