"""Grouped-query attention: one matrix for queries, keys and values, a kernel, one matrix out."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modern_llm.config import ModelConfig
from modern_llm.models.cost import Cost, part_cost
from modern_llm.models.dims import Dims
from modern_llm.models.kernels import KERNELS, Kernel
from modern_llm.models.kv_cache import KVCache, StreamingCache
from modern_llm.models.linear import Linear
from modern_llm.models.norms import NORMS
from modern_llm.models.positions import PositionEncoding


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one forward share.

    Attributes:
        position: the model's encoding.
        prepared: its `prepare` for the new tokens.
        prepared_keys: its `prepare` for all keys, when a cache keeps them without position.
        bias: added to the logits, broadcastable to ``(B, N, T, S)``; masks are in it.
        is_causal: the plain causal mask, without bias.
        cache: keys and values so far.
    """

    position: PositionEncoding
    prepared: Any
    prepared_keys: Any = None
    bias: Tensor | None = None
    is_causal: bool = True
    cache: KVCache | StreamingCache | None = None


class Attention(nn.Module):
    """Self-attention with N query heads that share K key/value heads (arXiv:2305.13245).

    Args:
        config: chooses kernel, query-key norm (arXiv:2302.05442, sec. 2.1), sink and dropout.
        dims: sizes.
        layer: index in the cache.
    """

    def __init__(self, config: ModelConfig, dims: Dims, layer: int) -> None:
        super().__init__()
        self.dims, self.layer, self.dropout = dims, layer, config.dropout
        heads = dims.n_heads + 2 * dims.n_kv_heads
        self.qkv = Linear(dims.d_model, heads * dims.head_size, bias=dims.bias)
        self.out = Linear(
            dims.n_heads * dims.head_size, dims.d_model, bias=dims.bias, residual=True
        )
        self.kernel: Kernel = KERNELS.build(config.attention_backend)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = NORMS.build(config.norm, dims.head_size, config.norm_eps, dims.bias)
            self.k_norm = NORMS.build(config.norm, dims.head_size, config.norm_eps, dims.bias)
        learned = config.sink == "learned"
        self.sink_N = nn.Parameter(torch.zeros(dims.n_heads)) if learned else None

    def forward(self, x_BTD: Tensor, context: AttentionContext) -> Tensor:
        """``(B, T, D)`` -> ``(B, T, D)``."""
        n_heads, n_kv_heads = self.dims.n_heads, self.dims.n_kv_heads
        qkv = self.qkv(x_BTD).unflatten(-1, (-1, self.dims.head_size))
        qk, v_BTKH = torch.split(qkv, [n_heads + n_kv_heads, n_kv_heads], 2)
        if self.qk_norm:
            q, k = torch.split(qk, [n_heads, n_kv_heads], 2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], 2)
        streaming = context.prepared_keys is not None
        if not streaming:
            qk = context.position.rotate(qk, context.prepared)
        q_BTNH, k_BTKH = torch.split(qk, [n_heads, n_kv_heads], 2)
        if streaming:
            q_BTNH = context.position.rotate(q_BTNH, context.prepared)
        k_BKSH, v_BKSH = k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2)
        if context.cache is not None:
            k_BKSH, v_BKSH = context.cache.update(self.layer, k_BKSH, v_BKSH)
        if streaming:
            k_BSKH = k_BKSH.transpose(1, 2)
            k_BKSH = context.position.rotate(k_BSKH, context.prepared_keys).transpose(1, 2)
        out_BNTH = self.kernel(
            q_BTNH.transpose(1, 2),
            k_BKSH,
            v_BKSH,
            context.bias,
            is_causal=context.is_causal,
            sink_N=self.sink_N,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.out(out_BNTH.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def cost(self, seq_len: int) -> Cost:
        """Two matrices, and every query against ``seq_len`` keys."""
        kernel = self.kernel.flops(
            self.dims.n_heads, self.dims.head_size, seq_len, sink=self.sink_N is not None
        )
        projections = part_cost("projections", self, flops=self.qkv.flops() + self.out.flops())
        return projections + Cost(0, 0, 0, kernel, {"attention": kernel})
