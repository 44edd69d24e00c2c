"""Feed-forward layers and their activations.

To add one: a subclass of `FFN` that takes ``(dims, activation, linear)``, builds its matrices with
``linear(in, out, bias=..., residual=...)``, passes ``*groups`` on to each of them (so that it also
serves as the experts of a mixture) and registers a name. Where three matrices make it gated, its
default width needs the name in ``GATED_FFNS`` of `modern_llm.config.model`; a test says so.
"""

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

from modern_llm.models.cost import Cost, part_cost
from modern_llm.models.dims import Dims
from modern_llm.models.linear import Factory, GroupedLinear, Linear
from modern_llm.registry import Registry

ACTIVATIONS = Registry("activation")

ACTIVATIONS.register("relu")(F.relu)
ACTIVATIONS.register("silu", "swish")(F.silu)
ACTIVATIONS.register("gelu")(F.gelu)
ACTIVATIONS.register("leaky_relu")(F.leaky_relu)


@ACTIVATIONS.register("gelu_tanh", "gelu_new")
def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as GPT-2 has it (arXiv:1606.08415, sec. 2)."""
    return F.gelu(x, approximate="tanh")


class FFN(nn.Module, ABC):
    """A feed-forward on the last axis, ``(..., D)`` -> ``(..., D)``."""

    @abstractmethod
    def forward(self, x: Tensor, *groups: Tensor) -> Tensor:
        """``groups`` goes to each linear layer: nothing, or the row counts of experts."""

    def cost(self, seq_len: int) -> Cost:
        """The matrices, each used once a token."""
        layers = [m for m in self.modules() if isinstance(m, Linear | GroupedLinear)]
        return part_cost("ffn", self, flops=sum(layer.flops() for layer in layers))


FFNS = Registry("feed-forward", base=FFN, sizes=("dims", "activation", "linear"))


@FFNS.register("standard", "mlp")
class StandardFFN(FFN):
    """``W2 f(W1 x)`` (arXiv:1706.03762, eq. 2) with the activation ``f`` of the config."""

    def __init__(self, dims: Dims, activation: str, linear: Factory = Linear) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.up = linear(dims.d_model, dims.d_ff, bias=dims.bias)
        self.down = linear(dims.d_ff, dims.d_model, bias=dims.bias, residual=True)

    def forward(self, x: Tensor, *groups: Tensor) -> Tensor:
        """As in `FFN`."""
        return self.down(self.activation(self.up(x, *groups)), *groups)  # type: ignore[no-any-return]


@FFNS.register("relu2")
class SquaredReLU(FFN):
    """``W2 max(W1 x, 0)^2`` (Primer, arXiv:2109.08668, sec. 4)."""

    def __init__(self, dims: Dims, activation: str, linear: Factory = Linear) -> None:
        super().__init__()
        self.up = linear(dims.d_model, dims.d_ff, bias=dims.bias)
        self.down = linear(dims.d_ff, dims.d_model, bias=dims.bias, residual=True)

    def forward(self, x: Tensor, *groups: Tensor) -> Tensor:
        """As in `FFN`."""
        return self.down(F.relu(self.up(x, *groups)).square(), *groups)  # type: ignore[no-any-return]


class GatedFFN(FFN):
    """``W2 (f(Wg x) * Wu x)``; ``Wg`` and ``Wu`` are one matrix."""

    def __init__(self, dims: Dims, activation: str, linear: Factory = Linear) -> None:
        super().__init__()
        self.gate_up = linear(dims.d_model, 2 * dims.d_ff, bias=dims.bias)
        self.down = linear(dims.d_ff, dims.d_model, bias=dims.bias, residual=True)

    @abstractmethod
    def gate(self, x: Tensor) -> Tensor:
        """The nonlinearity ``f``."""

    def forward(self, x: Tensor, *groups: Tensor) -> Tensor:
        """As in `FFN`."""
        gate, up = self.gate_up(x, *groups).chunk(2, -1)
        return self.down(self.gate(gate) * up, *groups)  # type: ignore[no-any-return]


@FFNS.register("swiglu")
class SwiGLU(GatedFFN):
    """``W2 (silu(Wg x) * Wu x)`` (arXiv:2002.05202, eq. 6)."""

    def gate(self, x: Tensor) -> Tensor:
        """SiLU."""
        return F.silu(x)


@FFNS.register("geglu")
class GeGLU(GatedFFN):
    """``W2 (gelu(Wg x) * Wu x)`` (arXiv:2002.05202, eq. 6)."""

    def gate(self, x: Tensor) -> Tensor:
        """GELU, exact."""
        return F.gelu(x)
