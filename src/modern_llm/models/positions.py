"""Position encodings: three hooks, each a no-op unless an encoding says otherwise.

To add one: a subclass of `PositionEncoding` that takes ``(dims)`` and its own keyword-only
options, overrides the hooks that it needs, and registers a name.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from modern_llm.errors import ConfigError
from modern_llm.models.cost import Cost
from modern_llm.models.dims import Dims
from modern_llm.registry import Registry

POSITIONS = Registry("position encoding")


class PositionEncoding(nn.Module):
    """Where a position enters: the embedding, the queries and keys, or the attention logits.

    ``pos_BT`` holds positions in tokens, int64, of shape ``(B, T)`` or ``(1, T)``.

    Attributes:
        relative: True when the encoding acts on queries, keys or logits only, so that a cached
            key can be given another position later (streaming needs it).
    """

    relative = True

    def embed(self, x_BTD: Tensor, pos_BT: Tensor) -> Tensor:
        """Token embeddings with the position added."""
        return x_BTD

    def prepare(self, pos_BT: Tensor) -> Any:
        """What `rotate` needs for these positions; computed once for all layers."""
        return None

    def rotate(self, x_BTNH: Tensor, prepared: Any) -> Tensor:
        """Queries or keys with the position worked in; any number of heads."""
        return x_BTNH

    def bias(self, pos_BT: Tensor, pos_BS: Tensor) -> Tensor | None:
        """Added to the logits: ``(B or 1, N, T, S)`` in float32, or None (keeps the fast path)."""
        return None

    def cost(self, seq_len: int) -> Cost:
        """Nothing, unless the encoding is learned."""
        return Cost()


@POSITIONS.register("none", "nope")
class NoPosition(PositionEncoding):
    """No encoding: the causal mask alone tells order (arXiv:2305.19466)."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()


@POSITIONS.register("learned", "absolute")
class LearnedPosition(PositionEncoding):
    """A learned vector a position, added to the token embedding (GPT-2).

    Args:
        dims: ``max_seq_len`` rows of ``d_model``.
    """

    relative = False

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.table = nn.Embedding(dims.max_seq_len, dims.d_model)

    def embed(self, x_BTD: Tensor, pos_BT: Tensor) -> Tensor:
        """``x + table[pos]``."""
        return x_BTD + self.table(pos_BT)  # type: ignore[no-any-return]

    def cost(self, seq_len: int) -> Cost:
        """The table; a look-up has no matrix product."""
        count = self.table.weight.numel()
        return Cost(count, count, count)


@POSITIONS.register("rope", "rotary")
class RoPE(PositionEncoding):
    """Rotary embedding (arXiv:2104.09864, eq. 34), each half of a head a coordinate of the pairs.

    Pair ``i`` of ``H/2`` is turned by ``pos * theta^(-2i/H)``. Angles are computed and kept in
    float32 in a plain attribute, out of reach of ``model.to(bfloat16)`` and of the state dict.

    Args:
        dims: ``head_size`` (even) and ``max_seq_len``.
        theta: base of the wavelengths.

    Raises:
        ConfigError: the head size is odd, or theta is not positive.
    """

    cos_sin: Tensor  # (2, max_seq_len, H): cos and signed sin

    def __init__(self, dims: Dims, *, theta: float = 10_000.0) -> None:
        super().__init__()
        if dims.head_size % 2:
            raise ConfigError(
                f"position encoding 'rope' turns pairs: head_size = d_model / n_heads must be "
                f"even, got {dims.head_size}"
            )
        if theta <= 0:
            raise ConfigError(f"position encoding 'rope': theta={theta} must be above 0")
        self.theta, self.head_size, self.max_seq_len = theta, dims.head_size, dims.max_seq_len
        self.cos_sin = self._angles(torch.get_default_device())

    def _angles(self, device: torch.device) -> Tensor:
        pair = torch.arange(0, self.head_size, 2, device=device, dtype=torch.float32)
        frequency = self.theta ** (-pair / self.head_size)
        position = torch.arange(self.max_seq_len, device=device, dtype=torch.float32)
        angle = torch.outer(position, frequency)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to another device, never to another dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0, device=self.cos_sin.device)).device
        if device != self.cos_sin.device:
            self.cos_sin = self._angles(device)
        return self

    def prepare(self, pos_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, ``(B, T, 1, H)`` each, in float32."""
        cos_BTH, sin_BTH = self.cos_sin[:, pos_BT].unbind(0)
        return cos_BTH.unsqueeze(2), sin_BTH.unsqueeze(2)

    def rotate(self, x_BTNH: Tensor, prepared: tuple[Tensor, Tensor]) -> Tensor:
        """``x cos + swap(x) sin``, computed in float32, returned in the dtype of ``x``."""
        cos, sin = prepared
        first, second = x_BTNH.chunk(2, -1)
        swapped = torch.cat([second, first], -1)  # a roll, which compiles to slower code
        return torch.addcmul(x_BTNH * cos, swapped, sin).to(x_BTNH.dtype)
