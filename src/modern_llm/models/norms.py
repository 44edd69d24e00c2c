"""Normalisation layers; statistics are accumulated in float32 whatever the input's dtype.

To add one: a class that takes ``(width, eps, bias)`` and registers a name.
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modern_llm.models.cost import Cost, part_cost
from modern_llm.registry import Registry


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 when it is."""
    return x if x.dtype is torch.float64 else x.float()


class Norm(nn.Module, ABC):
    """Normalises the last axis; the output has the input's shape and dtype."""

    weight: nn.Parameter

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``(..., width)`` -> the same shape and dtype."""

    def cost(self, seq_len: int) -> Cost:
        """Parameters only: a norm has no matrix product."""
        return part_cost("norm", self)


NORMS = Registry("norm", base=Norm, sizes=("width", "eps", "bias"))


@NORMS.register("rmsnorm", "rms_norm", "rms")
class RMSNorm(Norm):
    """Root-mean-square norm: ``x / sqrt(mean(x^2) + eps) * weight`` (arXiv:1910.07467, eq. 4).

    Args:
        width: size of the normalised axis.
        eps: added to the mean square.
        bias: for other norms; this method has none.
    """

    def __init__(self, width: int, eps: float, bias: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., width)`` -> the same shape and dtype."""
        x32, weight = at_least_float32(x), at_least_float32(self.weight)
        return F.rms_norm(x32, weight.shape, weight, self.eps).to(x.dtype)


@NORMS.register("layernorm", "layer_norm", "ln")
class LayerNorm(Norm):
    """Layer norm: ``(x - mean) / sqrt(var + eps) * weight + bias`` (arXiv:1607.06450, eq. 3).

    Args:
        width: size of the normalised axis.
        eps: added to the (biased) variance.
        bias: whether an offset is learned.
    """

    def __init__(self, width: int, eps: float, bias: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``(..., width)`` -> the same shape and dtype."""
        x32, weight = at_least_float32(x), at_least_float32(self.weight)
        bias = None if self.bias is None else at_least_float32(self.bias)
        return F.layer_norm(x32, weight.shape, weight, bias, self.eps).to(x.dtype)


@NORMS.register("layernorm_nobias", "layer_norm_nobias")
class LayerNormNoBias(LayerNorm):
    """`LayerNorm` without an offset, also in a model whose linear layers have biases."""

    def __init__(self, width: int, eps: float, bias: bool = False) -> None:
        super().__init__(width, eps, bias=False)


@NORMS.register("scalenorm", "scale_norm")
class ScaleNorm(Norm):
    """One gain for all coordinates: ``g x / max(|x|, eps)`` (arXiv:1910.05895, eq. 5).

    Args:
        width: size of the normalised axis; the gain starts at its square root.
        eps: least length that is divided by.
        bias: for other norms; this method has none.
    """

    def __init__(self, width: int, eps: float, bias: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((1,), math.sqrt(width)))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., width)`` -> the same shape and dtype."""
        x32, weight = at_least_float32(x), at_least_float32(self.weight)
        length: Tensor = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        return (x32 / length.clamp(min=self.eps) * weight).to(x.dtype)
