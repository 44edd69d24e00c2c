"""The sizes that the builder hands to every component."""

from dataclasses import dataclass
from typing import Self

from modern_llm.config import ModelConfig


@dataclass(frozen=True)
class Dims:
    """Sizes of one decoder; the letters are those of the legend in `modern_llm.models`.

    Attributes:
        d_model: width of the residual stream (D).
        n_heads: query heads (N).
        n_kv_heads: key/value heads (K); N is a multiple of it.
        head_size: width of a head (H).
        d_ff: hidden width of a feed-forward or of one expert (F).
        max_seq_len: positions, in tokens.
        bias: whether linear layers and layer norms have a bias.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    d_ff: int
    max_seq_len: int
    bias: bool = False

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """Sizes of ``config``."""
        return cls(
            d_model=config.d_model,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_size=config.head_size,
            d_ff=config.d_ff,
            max_seq_len=config.max_seq_len,
            bias=config.bias,
        )
