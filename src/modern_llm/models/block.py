"""One layer: attention and a feed-forward, each with a norm and a residual connection."""

import torch.nn.functional as F
from torch import Tensor, nn

from modern_llm.config import ModelConfig
from modern_llm.models.attention import ATTENTIONS, AttentionContext
from modern_llm.models.cost import Cost
from modern_llm.models.dims import Dims
from modern_llm.models.ffn import FFNS
from modern_llm.models.moe import MoE, Routing
from modern_llm.models.norms import NORMS


class Block(nn.Module):
    """``x + f(norm(x))`` (pre) or ``norm(x + f(x))`` (post: arXiv:1706.03762), for both parts.

    Args:
        config: component choices.
        dims: sizes.
        layer: index, from 0.
    """

    def __init__(self, config: ModelConfig, dims: Dims, layer: int) -> None:
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.dropout = config.dropout
        self.attention_norm = NORMS.build(config.norm, dims.d_model, config.norm_eps, dims.bias)
        self.attention = ATTENTIONS.build(config.attention, config, dims, layer)
        self.ffn_norm = NORMS.build(config.norm, dims.d_model, config.norm_eps, dims.bias)
        self.moe: MoE | None = None
        self.ffn: nn.Module | None = None
        if config.moe is not None and (layer + 1) % config.moe.every == 0:
            self.moe = MoE(config, dims, config.moe)
        else:
            self.ffn = FFNS.build(config.ffn, dims, config.activation)

    def forward(self, x_BTD: Tensor, context: AttentionContext) -> tuple[Tensor, Routing | None]:
        """``(B, T, D)`` -> ``(B, T, D)``, and the routing of a mixture of experts."""
        if self.pre_norm:
            x_BTD = x_BTD + self._drop(self.attention(self.attention_norm(x_BTD), context))
            out_BTD, routing = self._feed_forward(self.ffn_norm(x_BTD))
            return x_BTD + self._drop(out_BTD), routing
        x_BTD = self.attention_norm(x_BTD + self._drop(self.attention(x_BTD, context)))
        out_BTD, routing = self._feed_forward(x_BTD)
        return self.ffn_norm(x_BTD + self._drop(out_BTD)), routing

    def _feed_forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing | None]:
        if self.moe is not None:
            out: tuple[Tensor, Routing] = self.moe(x_BTD)
            return out
        assert self.ffn is not None
        return self.ffn(x_BTD), None

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x

    def cost(self, seq_len: int) -> Cost:
        """Sum over the parts."""
        mixer = self.moe if self.moe is not None else self.ffn
        parts = (self.attention_norm, self.attention, self.ffn_norm, mixer)
        return sum((part.cost(seq_len) for part in parts), start=Cost())  # type: ignore[union-attr,operator]
