"""What the gradient of a step looks like, as numbers to log."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from modern_llm.models.weights import whole


@torch.no_grad()
def gradient_statistics(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Mean, standard deviation, least and largest of all entries, and the norm of each part.

    A part is a block (``blocks.3``), or what stands beside the blocks (``embedding``). Keys begin
    with ``gradient.``; values are float64 scalars; parameters without a gradient are left out.

    Args:
        named: names and parameters, their gradients unscaled and not yet clipped.
    """
    given = [(_part(name), whole(p.grad).double()) for name, p in named if p.grad is not None]
    if not given:
        return {}
    count = sum(gradient.numel() for _, gradient in given)
    square_P = torch.stack([gradient.square().sum() for _, gradient in given])
    mean = torch.stack([gradient.sum() for _, gradient in given]).sum() / count
    parts: dict[str, Tensor] = {}
    for (part, _), square in zip(given, square_P, strict=True):
        parts[part] = parts.get(part, torch.zeros_like(square)) + square
    return {
        "gradient.mean": mean,
        "gradient.std": (square_P.sum() / count - mean.square()).clamp(min=0).sqrt(),
        "gradient.min": torch.stack([gradient.min() for _, gradient in given]).min(),
        "gradient.max": torch.stack([gradient.max() for _, gradient in given]).max(),
        **{f"gradient.norm.{part}": square.sqrt() for part, square in parts.items()},
    }


def _part(name: str) -> str:
    """``blocks.3`` of ``trunk.blocks.3.ffn.up.weight``, ``embedding`` of ``embedding.weight``."""
    parts = name.removeprefix("trunk.").split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
