"""Position encodings: three hooks, each a no-op unless an encoding says otherwise.

To add one: a subclass of `PositionEncoding` that takes ``(dims)`` and its own keyword-only
options, overrides the hooks that it needs, and registers a name.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from modern_llm.errors import ConfigError
from modern_llm.models.cost import Cost
from modern_llm.models.dims import Dims
from modern_llm.registry import Registry


class PositionEncoding(nn.Module):
    """Where a position enters: the embedding, the queries and keys, or the attention logits.

    ``pos_BT`` holds positions in tokens, int64, of shape ``(B, T)`` or ``(1, T)``.

    Attributes:
        relative: True when the encoding acts on queries, keys or logits only, so that a cached
            key can be given another position later (streaming needs it).
    """

    relative = True

    @property
    def has_bias(self) -> bool:
        """Whether it adds to the attention logits."""
        return type(self).bias is not PositionEncoding.bias

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


POSITIONS = Registry("position encoding", base=PositionEncoding, sizes=("dims",))


@POSITIONS.register("none", "nope")
class NoPosition(PositionEncoding):
    """No encoding: the causal mask alone tells order (arXiv:2305.19466)."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()


@POSITIONS.register("learned", "learned_absolute", "absolute")
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


class TabledEncoding(PositionEncoding, ABC):
    """Keeps a float32 table a position in a plain attribute.

    ``model.to(bfloat16)`` cannot reach it, and it is no part of the state dict.
    """

    table: Tensor

    @abstractmethod
    def _computed(self, device: torch.device) -> Tensor:
        """The table in float32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to another device, never to another dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0, device=self.table.device)).device
        if device != self.table.device:
            self.table = self._computed(device)
        return self


@POSITIONS.register("sinusoidal")
class SinusoidalPosition(TabledEncoding):
    """Fixed sines and cosines added to the embedding (arXiv:1706.03762, sec. 3.5).

    Coordinate ``2i`` of position ``t`` is ``sin(t / 10000^(2i/D))``, coordinate ``2i + 1`` the
    cosine; the embedding is multiplied by ``sqrt(D)`` first (sec. 3.4).

    Args:
        dims: ``d_model`` (even) and ``max_seq_len``.

    Raises:
        ConfigError: the width is odd.
    """

    relative = False

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        if dims.d_model % 2:
            raise ConfigError(
                f"position encoding 'sinusoidal' fills pairs: d_model must be even, "
                f"got {dims.d_model}"
            )
        self.width, self.max_seq_len = dims.d_model, dims.max_seq_len
        self.table = self._computed(torch.get_default_device())

    def _computed(self, device: torch.device) -> Tensor:
        pair = torch.arange(0, self.width, 2, device=device, dtype=torch.float32)
        position = torch.arange(self.max_seq_len, device=device, dtype=torch.float32)
        angle = torch.outer(position, 10_000.0 ** (-pair / self.width))
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)

    def embed(self, x_BTD: Tensor, pos_BT: Tensor) -> Tensor:
        """``sqrt(D) x + table[pos]``."""
        return x_BTD * math.sqrt(self.width) + self.table[pos_BT].to(x_BTD.dtype)


@POSITIONS.register("alibi")
class ALiBi(PositionEncoding):
    """Attention with linear biases (arXiv:2108.12409, sec. 3).

    Adds ``-slope_n (t - s)`` to the logit of query position ``t`` and key position ``s``. Head
    ``n`` (from 1) of N, a power of two, has slope ``2^(-steepness n / N)``; another number of heads
    takes those of the power of two below, then every other one of the power above, as the authors'
    code does. Nothing is learned.

    Args:
        dims: ``n_heads`` (N).
        steepness: exponent of the flattest head; the paper uses 8.

    Raises:
        ConfigError: steepness is not positive.
    """

    def __init__(self, dims: Dims, *, steepness: float = 8.0) -> None:
        super().__init__()
        if steepness <= 0:
            raise ConfigError(f"position encoding 'alibi': steepness={steepness} must be above 0")
        below = 1 << (dims.n_heads.bit_length() - 1)
        slopes = [2 ** (-steepness * n / below) for n in range(1, below + 1)]
        slopes += [2 ** (-steepness * n / (2 * below)) for n in range(1, 2 * below, 2)]
        self.slopes = slopes[: dims.n_heads]

    def bias(self, pos_BT: Tensor, pos_BS: Tensor) -> Tensor:
        """``(B or 1, N, T, S)`` in float32; keys in the future are for the mask."""
        slope_N = torch.tensor(self.slopes, device=pos_BT.device)
        distance_BTS = pos_BT[:, :, None] - pos_BS[:, None, :]
        return -slope_N[:, None, None] * distance_BTS[:, None]


@POSITIONS.register("rope", "rotary")
class RoPE(TabledEncoding):
    """Rotary embedding (arXiv:2104.09864, eq. 34), each half of a head a coordinate of the pairs.

    Pair ``i`` of ``H/2`` is turned by ``pos * theta^(-2i/H)``, in float32. To read ``factor`` times
    the context that a model was trained on, ``linear`` turns all pairs ``factor`` times slower
    (arXiv:2306.15595), ``yarn`` only those that did not turn often enough in the old context, and
    sharpens the attention a little (arXiv:2309.00071, sec. 3.4).

    Args:
        dims: ``head_size`` (even) and ``max_seq_len``, the longer context.
        theta: base of the wavelengths.
        scaling: how the context is stretched.
        factor: longer context over the old one.
        beta_fast: pairs with more turns than this in the old context are left as they are (yarn).
        beta_slow: pairs with fewer turns than this are slowed in full (yarn).

    Raises:
        ConfigError: the head size is odd, an option is out of range, or options of a scaling that
            is not used.
    """

    def __init__(
        self,
        dims: Dims,
        *,
        theta: float = 10_000.0,
        scaling: Literal["none", "linear", "yarn"] = "none",
        factor: float = 1.0,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
    ) -> None:
        super().__init__()
        problems = []
        if dims.head_size % 2:
            problems.append(
                "it turns pairs, so head_size = d_model / n_heads must be even, "
                f"got {dims.head_size}"
            )
        if theta <= 1:
            problems.append(f"theta={theta} must be above 1")
        if (scaling == "none") != (factor == 1.0) or factor < 1:
            problems.append(f"factor={factor} must be above 1 with scaling linear or yarn, else 1")
        if scaling != "yarn" and (beta_fast, beta_slow) != (32.0, 1.0):
            problems.append("beta_fast and beta_slow are options of scaling=yarn")
        elif not 0 < beta_slow < beta_fast:
            problems.append(f"beta_slow={beta_slow} must be between 0 and beta_fast={beta_fast}")
        if problems:
            raise ConfigError(f"position encoding 'rope': {'; '.join(problems)}")
        self.theta, self.head_size, self.max_seq_len = theta, dims.head_size, dims.max_seq_len
        self.scaling, self.factor = scaling, factor
        self.beta_fast, self.beta_slow = beta_fast, beta_slow
        self.table = self._computed(torch.get_default_device())

    def _frequency(self, device: torch.device) -> Tensor:
        """Radians a token of each pair, ``(H/2,)``."""
        pair = torch.arange(0, self.head_size, 2, device=device, dtype=torch.float32)
        frequency = self.theta ** (-pair / self.head_size)
        if self.scaling == "linear":
            return frequency / self.factor
        if self.scaling == "yarn":
            first, last = (self._pair_with(turns) for turns in (self.beta_fast, self.beta_slow))
            low, high = max(math.floor(first), 0), min(math.ceil(last), self.head_size - 1)
            slowed = ((pair / 2 - low) / max(high - low, 0.001)).clamp(0, 1)
            return frequency * (1 - slowed) + frequency / self.factor * slowed
        return frequency

    def _pair_with(self, turns: float) -> float:
        """Index of the pair that turns so often in the old context (arXiv:2309.00071, eq. 17)."""
        old_context = self.max_seq_len / self.factor
        wavelengths = math.log(old_context / (turns * 2 * math.pi))
        return self.head_size * wavelengths / (2 * math.log(self.theta))

    def _computed(self, device: torch.device) -> Tensor:
        """Cosines and signed sines, ``(2, max_seq_len, H)``."""
        position = torch.arange(self.max_seq_len, device=device, dtype=torch.float32)
        angle = torch.outer(position, self._frequency(device))
        sharper = 0.1 * math.log(self.factor) + 1 if self.scaling == "yarn" else 1.0
        cos, sin = angle.cos() * sharper, angle.sin() * sharper
        return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])

    def prepare(self, pos_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, ``(B, T, 1, H)`` each, in float32."""
        cos_BTH, sin_BTH = self.table[:, pos_BT].unbind(0)
        return cos_BTH.unsqueeze(2), sin_BTH.unsqueeze(2)

    def rotate(self, x_BTNH: Tensor, prepared: tuple[Tensor, Tensor]) -> Tensor:
        """``x cos + swap(x) sin``, computed in float32, returned in the dtype of ``x``."""
        cos, sin = prepared
        first, second = x_BTNH.chunk(2, -1)
        swapped = torch.cat([second, first], -1)  # a roll, which compiles to slower code
        return torch.addcmul(x_BTNH * cos, swapped, sin).to(x_BTNH.dtype)
