"""Grouped-query attention: one matrix for queries, keys and values, a mixer, one matrix out.

To add a kind: a subclass of `Attention` with `mix` and `mix_flops`, and a name.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modern_llm.config import ModelConfig
from modern_llm.errors import ConfigError
from modern_llm.models.cost import Cost, part_cost
from modern_llm.models.dims import Dims
from modern_llm.models.kernels import KERNELS, Kernel
from modern_llm.models.kv_cache import KVCache, StateCache, StreamingCache
from modern_llm.models.linear import Linear
from modern_llm.models.masks import Piece, Window
from modern_llm.models.norms import NORMS, at_least_float32
from modern_llm.models.positions import POSITIONS, PositionEncoding
from modern_llm.registry import Registry

ATTENTIONS = Registry("attention")


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one forward share.

    Attributes:
        position: the model's encoding.
        prepared: its `prepare` for the new tokens.
        prepared_keys: its `prepare` for all keys, when a cache keeps them without position.
        bias: added to the logits, broadcastable to ``(B, N, T, S)``; masks are in it.
        is_causal: the plain causal mask, without bias.
        pieces: a window in pieces, each with its bias, in place of ``bias`` and ``is_causal``.
        cache: what is kept of the tokens so far.
    """

    position: PositionEncoding
    prepared: Any
    prepared_keys: Any = None
    bias: Tensor | None = None
    is_causal: bool = True
    pieces: tuple[Piece, ...] = ()
    cache: KVCache | StreamingCache | StateCache | None = None


class Attention(nn.Module, ABC):
    """Self-attention with N query heads that share K key/value heads (arXiv:2305.13245).

    Args:
        config: chooses query-key norm (arXiv:2302.05442, sec. 2.1) and what a kind needs.
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
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = NORMS.build(config.norm, dims.head_size, config.norm_eps, dims.bias)
            self.k_norm = NORMS.build(config.norm, dims.head_size, config.norm_eps, dims.bias)

    def forward(self, x_BTD: Tensor, context: AttentionContext) -> Tensor:
        """``(B, T, D)`` -> ``(B, T, D)``."""
        n_heads, n_kv_heads = self.dims.n_heads, self.dims.n_kv_heads
        qkv = self.qkv(x_BTD).unflatten(-1, (-1, self.dims.head_size))
        qk, v_BTKH = torch.split(qkv, [n_heads + n_kv_heads, n_kv_heads], 2)
        if self.qk_norm:
            q, k = self.split(qk)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], 2)
        out_BTNH = self.mix(qk, v_BTKH, context)
        return self.out(out_BTNH.flatten(2))  # type: ignore[no-any-return]

    def split(self, qk: Tensor) -> tuple[Tensor, ...]:
        """Queries ``(B, T, N, H)`` and keys ``(B, T, K, H)``, one tensor until they are rotated."""
        return torch.split(qk, [self.dims.n_heads, self.dims.n_kv_heads], 2)

    @abstractmethod
    def mix(self, qk: Tensor, v_BTKH: Tensor, context: AttentionContext) -> Tensor:
        """Values of all tokens that a token sees, weighted: ``(B, T, N, H)``.

        Args:
            qk: queries and keys, ``(B, T, N + K, H)``, without position.
            v_BTKH: values.
            context: positions, masks, cache.
        """

    @abstractmethod
    def mix_flops(self, seq_len: int) -> float:
        """Forward FLOPs of `mix`, for one token of a sequence of ``seq_len``."""

    def cost(self, seq_len: int) -> Cost:
        """Two matrices, and what mixes the values."""
        mixing = self.mix_flops(seq_len)
        projections = part_cost("projections", self, flops=self.qkv.flops() + self.out.flops())
        return projections + Cost(0, 0, 0, mixing, {"attention": mixing})


@ATTENTIONS.register("full")
class FullAttention(Attention):
    """Softmax over all keys that the mask shows, by the kernel of the config.

    Raises:
        ConfigError: the kernel cannot serve dropout, or capped logits.
    """

    def __init__(self, config: ModelConfig, dims: Dims, layer: int) -> None:
        super().__init__(config, dims, layer)
        self.kernel: Kernel = KERNELS.build(config.attention_backend)
        self.softcap = config.softcap
        for name in self.kernel.refuses:
            if getattr(config, name):
                able = ", ".join(k for k in KERNELS if name not in KERNELS.build(k).refuses)
                raise ConfigError(
                    f"attention backend '{config.attention_backend}' has no {name}: use one of "
                    f"{able}, or leave out model.{name}"
                )
        # With a bias on the logits no kernel leaves the future out: its products count.
        encoding: Any = POSITIONS[config.position.name]
        self.is_causal = encoding.bias is PositionEncoding.bias
        learned = config.sink == "learned"
        self.sink_N = nn.Parameter(torch.zeros(dims.n_heads)) if learned else None

    def mix(self, qk: Tensor, v_BTKH: Tensor, context: AttentionContext) -> Tensor:
        """As in `Attention`."""
        streaming = context.prepared_keys is not None
        if not streaming:
            qk = context.position.rotate(qk, context.prepared)
        q_BTNH, k_BTKH = self.split(qk)
        if streaming:
            q_BTNH = context.position.rotate(q_BTNH, context.prepared)
        k_BKSH, v_BKSH = k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2)
        if context.cache is not None:
            assert not isinstance(context.cache, StateCache)
            k_BKSH, v_BKSH = context.cache.update(self.layer, k_BKSH, v_BKSH)
        if streaming:
            k_BSKH = k_BKSH.transpose(1, 2)
            k_BKSH = context.position.rotate(k_BSKH, context.prepared_keys).transpose(1, 2)
        attend = partial(
            self.kernel,
            sink_N=self.sink_N,
            dropout=self.dropout if self.training else 0.0,
            softcap=self.softcap,
        )
        q_BNTH = q_BTNH.transpose(1, 2)
        if context.pieces:
            out_BNTH = in_pieces(attend, q_BNTH, k_BKSH, v_BKSH, context.pieces)
        else:
            out_BNTH = attend(q_BNTH, k_BKSH, v_BKSH, context.bias, is_causal=context.is_causal)
        return out_BNTH.transpose(1, 2)

    def mix_flops(self, seq_len: int) -> float:
        """Every query against ``seq_len`` keys."""
        return self.kernel.flops(
            self.dims.n_heads, self.dims.head_size, seq_len, sink=self.sink_N is not None,
            is_causal=self.is_causal,
        )  # fmt: skip


@ATTENTIONS.register("window")
class WindowAttention(FullAttention):
    """The last ``window`` keys and the first ``n_sinks`` (arXiv:2004.05150, sec. 3.1).

    The others are left out and hidden, in the layers that ``window_pattern`` names: there, time and
    memory grow with the text times the window, whatever the kernel.
    """

    def __init__(self, config: ModelConfig, dims: Dims, layer: int) -> None:
        super().__init__(config, dims, layer)
        assert config.window is not None
        windowed = config.window_pattern[layer % len(config.window_pattern)] == "S"
        self.window = Window(config.window, config.n_sinks) if windowed else None

    def mix_flops(self, seq_len: int) -> float:
        """Every query against the keys of its piece: fewer than ``window`` plus a block."""
        if self.window is None or seq_len <= self.window.size:
            return super().mix_flops(seq_len)
        sizes, sink = (self.dims.n_heads, self.dims.head_size), self.sink_N is not None
        total = sum(
            piece.n_queries * self.kernel.flops(*sizes, piece.n_keys, sink=sink, is_causal=False)
            for piece in self.window.pieces(seq_len, seq_len)
        )
        return total / seq_len


def in_pieces(
    attend: Callable[..., Tensor],
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    pieces: tuple[Piece, ...],
) -> Tensor:
    """Attention ``(B, N, T, H)`` of the queries of each piece to its own keys, by ``attend``."""
    queries = torch.split(q_BNTH, [piece.n_queries for piece in pieces], 2)
    keys, values = (_keys_of(pieces, x) for x in (k_BKSH, v_BKSH))
    biases = [piece.bias for piece in pieces]
    parts = [attend(*each) for each in zip(queries, keys, values, biases, strict=True)]
    return torch.cat(parts, 2)


def _keys_of(pieces: tuple[Piece, ...], x_BKSH: Tensor) -> list[Tensor]:
    """Keys or values of each piece, ``(B, K, n_keys, H)``.

    Put together from blocks: the gradient of a slice is as long as what it was cut from, and must
    not be as long as the text for every piece.
    """
    low = pieces[0].first_key
    begins = [low, *(piece.start for piece in pieces), pieces[-1].end]
    sizes = [end - begin for begin, end in itertools.pairwise(begins)]
    blocks = torch.split(x_BKSH[:, :, low:], sizes, 2)
    sinks = x_BKSH[:, :, : pieces[-1].n_sinks]
    found, first = [], 0
    for i, piece in enumerate(pieces):
        while begins[first + 1] <= piece.first_key:
            first += 1
        near = list(blocks[first : i + 2])
        near[0] = near[0][:, :, piece.first_key - begins[first] :]
        found.append(torch.cat([sinks, *near] if piece.n_sinks else near, 2))
    return found


@ATTENTIONS.register("linear")
class LinearAttention(Attention):
    """Causal linear attention (arXiv:2006.16236, eq. 9) with the features ``elu(x) + 1``.

    Token ``t`` gets ``phi(q_t) S_t / phi(q_t) z_t``, where ``S_t`` sums ``phi(k_s) v_s^T`` and
    ``z_t`` sums ``phi(k_s)`` over ``s <= t``: time grows linearly with the text, and a cache is a
    state of fixed size. A rotary encoding turns the features in the numerator only
    (arXiv:2104.09864, eq. 19). Sums are in float32. Text is worked through in chunks; where a mask
    hides more than the future (packed documents, preference pairs), by all products of queries and
    keys.
    """

    chunk_size = 64  # tokens whose products with each other are computed

    def mix(self, qk: Tensor, v_BTKH: Tensor, context: AttentionContext) -> Tensor:
        """As in `Attention`."""
        device = qk.device.type
        known = torch.amp.is_autocast_available(device)  # not on the meta device
        with torch.autocast(device, enabled=False) if known else nullcontext():
            features = F.elu(at_least_float32(qk)) + 1
            turned = context.position.rotate(features, context.prepared)
            q_BTNH, k_BTKH = self.split(features)
            turned_q_BTNH, turned_k_BTKH = self.split(turned)
            values = v_BTKH.to(features.dtype)
            if context.bias is not None:
                above, below = self._by_pairs(
                    (turned_q_BTNH, q_BTNH), (turned_k_BTKH, k_BTKH), values, context.bias
                )
            else:
                above, below = self._by_chunks(
                    (turned_q_BTNH, q_BTNH), (turned_k_BTKH, k_BTKH), values, context.cache
                )
            return (above / below.clamp(min=1e-6).unsqueeze(-1)).to(v_BTKH.dtype)

    def _grouped(self, q_BTNH: Tensor) -> Tensor:
        """``(B, K, N/K, T, H)``: query heads by the key/value head that they share."""
        rows, n_tokens = q_BTNH.shape[:2]
        by_key_head = q_BTNH.reshape(rows, n_tokens, self.dims.n_kv_heads, -1, q_BTNH.shape[3])
        return by_key_head.permute(0, 2, 3, 1, 4)

    def _by_pairs(
        self, q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], v_BTKH: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Numerator ``(B, T, N, H)`` and denominator ``(B, T, N)`` from T x T products."""
        seen_B11TS = bias.exp().to(v_BTKH.dtype).unsqueeze(1)
        turned, plain = (
            self._grouped(x) @ y.permute(0, 2, 3, 1).unsqueeze(2) * seen_B11TS
            for x, y in zip(q, k, strict=True)
        )
        above = turned @ v_BTKH.transpose(1, 2).unsqueeze(2)
        return above.flatten(1, 2).transpose(1, 2), plain.sum(-1).flatten(1, 2).transpose(1, 2)

    def _by_chunks(
        self,
        q: tuple[Tensor, Tensor],
        k: tuple[Tensor, Tensor],
        v_BTKH: Tensor,
        cache: KVCache | StreamingCache | StateCache | None,
    ) -> tuple[Tensor, Tensor]:
        """The same in linear time: within chunks by pairs, between them by the running state."""
        (q_BTNH, plain_q), (k_BTKH, plain_k) = q, k
        n_tokens = q_BTNH.shape[1]
        size = min(self.chunk_size, n_tokens)
        if isinstance(cache, StateCache):
            seen_BT = cache.seen(n_tokens, k_BTKH.device)
            if seen_BT is not None:
                k_BTKH, plain_k = (x * seen_BT[:, :, None, None] for x in (k_BTKH, plain_k))

        def chunks(x: Tensor) -> Tensor:  # (..., T, H) -> (..., chunks, size, H)
            x = F.pad(x, (0, 0, 0, -n_tokens % size))
            return x.reshape(*x.shape[:-2], -1, size, x.shape[-1])

        q_BKGCLH = chunks(self._grouped(q_BTNH))
        k_BKCLH, v_BKCLH = (chunks(x.transpose(1, 2)) for x in (k_BTKH, v_BTKH))
        within = (q_BKGCLH @ k_BKCLH.unsqueeze(2).transpose(-2, -1)).tril()
        sums_BKCHH = (k_BKCLH.transpose(-2, -1) @ v_BKCLH).cumsum(2)
        state_BKCHH = F.pad(sums_BKCHH, (0, 0, 0, 0, 1, 0))  # before each chunk, and after all
        sum_BTKH = plain_k.cumsum(1)
        if isinstance(cache, StateCache):
            if self.layer in cache.states:
                old_state_BKHH, old_sum_BKH = cache.states[self.layer]
                state_BKCHH = state_BKCHH + old_state_BKHH.unsqueeze(2)
                sum_BTKH = sum_BTKH + old_sum_BKH.unsqueeze(1)
            cache.states[self.layer] = state_BKCHH[:, :, -1], sum_BTKH[:, -1]
        before_BKCHH = state_BKCHH[:, :, :-1]
        above = within @ v_BKCLH.unsqueeze(2) + q_BKGCLH @ before_BKCHH.unsqueeze(2)
        above_BTNH = above.flatten(3, 4).flatten(1, 2)[:, :, :n_tokens].transpose(1, 2)
        below = (self._grouped(plain_q) * sum_BTKH.transpose(1, 2).unsqueeze(2)).sum(-1)
        return above_BTNH, below.flatten(1, 2).transpose(1, 2)

    def mix_flops(self, seq_len: int) -> float:
        """Two products with the tokens of a chunk, one with the state, and the state's own."""
        size, head_size = min(self.chunk_size, seq_len), self.dims.head_size
        worked = -(-seq_len // size) * size / seq_len  # the last chunk is filled up
        per_query = 4.0 * size * head_size + 2.0 * head_size**2
        per_key = 2.0 * head_size**2
        return worked * (self.dims.n_heads * per_query + self.dims.n_kv_heads * per_key)
