"""The decoder: embeddings, blocks, a last norm, a head."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modern_llm.config import ModelConfig
from modern_llm.errors import ConfigError
from modern_llm.models.attention import AttentionContext
from modern_llm.models.block import Block
from modern_llm.models.cost import Cost
from modern_llm.models.dims import Dims
from modern_llm.models.initialize import calm_tied_logits, initialize, initialize_again
from modern_llm.models.kv_cache import KVCache, StateCache, StreamingCache
from modern_llm.models.linear import Linear
from modern_llm.models.loss import IGNORE, chunk_loss, chunked_loss_sum
from modern_llm.models.masks import Piece, Window, additive, document_positions, visible_keys
from modern_llm.models.moe import Routing
from modern_llm.models.norms import NORMS
from modern_llm.models.positions import POSITIONS, PositionEncoding
from modern_llm.models.weights import WeightsMixin

ROWS = 64  # the head multiplies a multiple of so many rows

Cache = KVCache | StreamingCache | StateCache


class ModernDecoderLM(WeightsMixin):
    """A causal language model whose every part is chosen by ``config``.

    Tied embeddings are one parameter, ``embedding.weight``: there is no ``head.weight`` then, in
    the model as in its `weights`. To compile, call `compile`: names stay as they are.

    Args:
        config: sizes and components; kept as ``.config``.

    Raises:
        ConfigError: an unknown component or option, or sizes that a component cannot take.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dims = Dims.of(config)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position: PositionEncoding = POSITIONS.build(config.position, dims)
        if config.attention == "linear" and self.position.has_bias:
            raise ConfigError(
                f"attention=linear has no logits, which position encoding "
                f"'{config.position.name}' adds to: use rope, learned, sinusoidal or none"
            )
        self.blocks = nn.ModuleList(Block(config, dims, i) for i in range(config.n_layers))
        self.window = None if config.window is None else Window(config.window, config.n_sinks)
        pattern = config.window_pattern * config.n_layers
        self.windowed = [letter == "S" for letter in pattern[: config.n_layers]]
        pre_norm = config.norm_position == "pre"
        self.final_norm: nn.Module | None = None
        if pre_norm:
            self.final_norm = NORMS.build(config.norm, config.d_model, config.norm_eps, config.bias)
        self.head: Linear | None = None
        if not config.tie_embeddings:
            self.head = Linear(config.d_model, config.vocab_size, bias=False)
        self.activation_checkpointing = False
        self._chunk_loss = chunk_loss
        self._routing: list[tuple[int, Routing]] = []
        initialize(self, config)
        if config.tie_embeddings:
            last_norm = self.final_norm if pre_norm else self.blocks[-1].ffn_norm
            calm_tied_logits(last_norm, config)  # type: ignore[arg-type]

    def initialize_again(self) -> None:
        """Draw what the constructor could not, see `models.initialize.without_memory`."""
        initialize_again(self, self.config)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each block, in place, and the loss of a chunk; options as of ``torch.compile``.

        Equal blocks share one graph, so that any number of layers compiles in the time of one, and
        what is around them (``at_M``, the head, a value head) makes nothing compile again.
        """
        for block in self.blocks:
            block.compile(*args, **kwargs)
        self._chunk_loss = torch.compile(chunk_loss, *args, **kwargs)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        pos_BT: Tensor | None = None,
        doc_ids_BT: Tensor | None = None,
        mask_BTS: Tensor | None = None,
        pad_B: Tensor | None = None,
        cache: Cache | None = None,
        at_M: Tensor | None = None,
        labels_M: Tensor | None = None,
        loss_chunk: int = 0,
    ) -> Tensor:
        """Logits ``(B, T, V)`` in the compute dtype (losses want ``.float()``), or a loss.

        Args:
            tokens_BT: token ids, int64.
            pos_BT: positions in tokens; default: from 0, or on from the cache, not counting left
                padding, and from 0 again at each document.
            doc_ids_BT: int64; tokens of different documents do not see each other.
            mask_BTS: bool, True = may attend; composes with the causal mask and all others.
            pad_B: tokens of left padding of each row; default with a cache: the cache's.
            cache: keys and values so far; it is extended by these tokens.
            at_M: flat indices into B*T; returns logits ``(M, V)`` there only.
            labels_M: ``(B, T)``, or ``(M,)`` beside ``at_M``: ids, or -100; returns the sum in nats
                of the cross entropy, a scalar in float32, in place of logits.
            loss_chunk: tokens whose logits stand at once, for ``labels_M``; 0: all.

        Raises:
            ConfigError: more tokens than ``max_seq_len``, or than the cache has room for.
            ValueError: arguments that exclude each other.
        """
        hidden_BTD = self.hidden(
            tokens_BT, pos_BT=pos_BT, doc_ids_BT=doc_ids_BT, mask_BTS=mask_BTS, pad_B=pad_B,
            cache=cache,
        )  # fmt: skip
        if loss_chunk and labels_M is None:
            raise ValueError("loss_chunk is of the loss: it needs labels_M")
        if labels_M is not None:
            return self.loss_sum(hidden_BTD, labels_M, at_M=at_M, chunk=loss_chunk)
        return self.logits(hidden_BTD) if at_M is None else self.logits_at(hidden_BTD, at_M)

    def loss_sum(
        self, hidden_BTD: Tensor, labels_M: Tensor, *, at_M: Tensor | None, chunk: int
    ) -> Tensor:
        """Cross entropy without all logits at once; see `forward` and `chunked_loss_sum`."""
        hidden_MD, labels_M = hidden_BTD.flatten(0, 1), labels_M.flatten()
        if at_M is not None:  # as in `logits_at`
            hidden_MD = hidden_MD[F.pad(at_M, (0, -at_M.shape[0] % ROWS))]
            labels_M = F.pad(labels_M, (0, -at_M.shape[0] % ROWS), value=IGNORE)
        return chunked_loss_sum(
            hidden_MD, self.head_weight(), labels_M,
            chunk=chunk, dtype=self.compute_dtype(), chunk_loss=self._chunk_loss,
        )  # fmt: skip

    def head_weight(self) -> Tensor:
        """The head's matrix ``(V, D)``: a parameter of its own, or the embedding's."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits_at(self, hidden_BTD: Tensor, at_M: Tensor) -> Tensor:
        """Logits ``(M, V)`` at flat indices into B*T.

        The product has a multiple of `ROWS` rows: oneDNN keeps a compiled kernel for every shape
        that it meets, and the count of supervised tokens is another one in each batch.
        """
        n_rows = at_M.shape[0]
        padded_M = F.pad(at_M, (0, -n_rows % ROWS))
        return self.logits(hidden_BTD.flatten(0, 1)[padded_M])[:n_rows]

    def logits(self, hidden: Tensor) -> Tensor:
        """``(..., D)`` from `hidden` -> ``(..., V)``."""
        weight = self.head_weight()
        return F.linear(hidden.to(weight.dtype), weight)

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        pos_BT: Tensor | None = None,
        doc_ids_BT: Tensor | None = None,
        mask_BTS: Tensor | None = None,
        pad_B: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden state ``(B, T, D)`` after the last norm; arguments as in `forward`."""
        n_tokens = tokens_BT.shape[1]
        if isinstance(cache, StreamingCache):
            if any(x is not None for x in (pos_BT, doc_ids_BT, mask_BTS, pad_B)):
                raise ValueError("a streaming cache takes no positions, documents, mask or padding")
            if n_tokens > cache.room():
                raise ConfigError(
                    f"{n_tokens} tokens exceed the streaming cache: feed {cache.room()} at most"
                )
            cache.evict()
        elif cache is not None:
            if pos_BT is not None or doc_ids_BT is not None:
                raise ValueError("with a cache, positions follow from its length and padding")
            if cache.length + n_tokens > cache.max_len:
                raise ConfigError(
                    f"{cache.length} + {n_tokens} tokens exceed the cache of {cache.max_len}"
                )
            if pad_B is None:
                pad_B = cache.pad_B
            cache.pad_B = pad_B
        # Only then are keys as many tokens back as positions, and sinks the first of all tokens.
        by_index = pos_BT is None and mask_BTS is None
        if self.config.n_sinks:
            by_index = by_index and doc_ids_BT is None and pad_B is None
        pos_BT, pos_BS = self._positions(tokens_BT, pos_BT, doc_ids_BT, pad_B, cache)
        contexts = self._contexts(
            pos_BT, pos_BS, doc_ids_BT, mask_BTS, pad_B, cache, by_index=by_index
        )
        x_BTD = self.position.embed(self.embedding(tokens_BT), pos_BT)
        if self.training and self.config.dropout:
            x_BTD = F.dropout(x_BTD, self.config.dropout)
        routing: list[tuple[int, Routing]] = []
        for layer, block in enumerate(self.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTD, routed = checkpoint(block, x_BTD, contexts[layer], use_reentrant=False)
            else:
                x_BTD, routed = block(x_BTD, contexts[layer])
            if routed is not None:
                routing.append((layer, routed))
        self._routing = routing
        if cache is not None:
            cache.length += n_tokens
        return x_BTD if self.final_norm is None else self.final_norm(x_BTD)

    def _positions(
        self,
        tokens_BT: Tensor,
        pos_BT: Tensor | None,
        doc_ids_BT: Tensor | None,
        pad_B: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        """Positions of the new tokens and of all keys, ``(B or 1, T)`` and ``(B or 1, S)``."""
        start = 0 if cache is None else cache.length
        n_keys, limit = start + tokens_BT.shape[1], self.config.max_seq_len
        if pad_B is None and n_keys > limit and pos_BT is None:
            raise ConfigError(f"{n_keys} tokens exceed max_seq_len={limit} of the model")
        if pos_BT is not None:
            return pos_BT, pos_BT
        if doc_ids_BT is not None:
            pos_BT = document_positions(doc_ids_BT)
            return pos_BT, pos_BT
        pos_BS = torch.arange(n_keys, device=tokens_BT.device)[None]
        if pad_B is not None:  # the clamp serves padding, and rows that ended before others
            pos_BS = (pos_BS - pad_B[:, None]).clamp(0, limit - 1)
        return pos_BS[:, start:], pos_BS

    def _contexts(
        self,
        pos_BT: Tensor,
        pos_BS: Tensor,
        doc_ids_BT: Tensor | None,
        mask_BTS: Tensor | None,
        pad_B: Tensor | None,
        cache: Cache | None,
        *,
        by_index: bool,
    ) -> list[AttentionContext]:
        """What each layer attends by: with the window or without, otherwise the same.

        Where tokens can be counted in place of positions (``by_index``), a window is cut in pieces.
        """
        streaming = isinstance(cache, StreamingCache)
        window = self.window
        if streaming or (window is not None and pos_BS.shape[1] <= window.size):
            window = None  # it hides nothing
        shared = {
            "position": self.position,
            "prepared": self.position.prepare(pos_BT),
            "prepared_keys": self.position.prepare(pos_BS) if streaming else None,
            "cache": cache,
        }
        if isinstance(cache, StateCache):  # the state has seen the past, and no padding
            return [AttentionContext(**shared)] * len(self.blocks)
        rules = {"doc_ids_BS": doc_ids_BT, "mask_BTS": mask_BTS, "pad_B": pad_B}
        contexts: dict[Window | None, AttentionContext] = {}
        for of_layer in {window if windowed else None for windowed in self.windowed}:
            if of_layer is not None and by_index:
                pieces = self._pieces(pos_BT, pos_BS, of_layer, doc_ids_BT, pad_B)
                contexts[of_layer] = AttentionContext(**shared, pieces=pieces)
            else:
                bias, is_causal = self._bias(pos_BT, pos_BS, window=of_layer, **rules)
                contexts[of_layer] = AttentionContext(**shared, bias=bias, is_causal=is_causal)
        return [contexts[window if windowed else None] for windowed in self.windowed]

    def _pieces(
        self,
        pos_BT: Tensor,
        pos_BS: Tensor,
        window: Window,
        doc_ids_BT: Tensor | None,
        pad_B: Tensor | None,
    ) -> tuple[Piece, ...]:
        """The window in pieces, each with masks and position bias; equal masks are one tensor."""
        n_queries, n_keys = pos_BT.shape[1], pos_BS.shape[1]
        plain = doc_ids_BT is None and pad_B is None and not self.position.has_bias
        pieces: list[Piece] = []
        biases: dict[tuple[int, int], Tensor | None] = {}
        for piece in window.pieces(n_queries, n_keys):
            shape = piece.n_queries, piece.n_keys
            if not plain or shape not in biases:
                biases[shape], _ = self._bias(
                    pos_BS[:, piece.start : piece.end],
                    piece.keys_of(pos_BS),
                    window=window if piece.n_queries > 1 else None,
                    doc_ids_BS=None if doc_ids_BT is None else piece.keys_of(doc_ids_BT),
                    pad_B=None if pad_B is None else pad_B - piece.first_key,
                )
            pieces.append(replace(piece, bias=biases[shape]))
        return tuple(pieces)

    def _bias(self, pos_BT: Tensor, pos_BS: Tensor, **rules: Any) -> tuple[Tensor | None, bool]:
        """Masks and position bias of a layer in one tensor, or none where the causal mask suffices.

        Args:
            pos_BT: positions of the queries.
            pos_BS: positions of the keys.
            **rules: as in `visible_keys`.
        """
        n_queries, n_keys = pos_BT.shape[1], pos_BS.shape[1]
        bias = self.position.bias(pos_BT, pos_BS)
        plain = all(rule is None for rule in rules.values())
        if plain and bias is None and n_queries == n_keys:
            return None, True
        if plain and n_queries == 1:
            return bias, False
        mask = additive(visible_keys(pos_BT, pos_BS, **rules), self.compute_dtype())
        return (mask if bias is None else bias + mask), False

    def compute_dtype(self) -> torch.dtype:
        """Dtype of matrix products: autocast's where it is on, else that of the weights."""
        device = self.embedding.weight.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.embedding.weight.dtype

    def new_cache(self, batch: int, max_len: int) -> KVCache | StateCache:
        """An empty cache for ``batch`` rows of at most ``max_len`` tokens, padding included."""
        if self.config.attention == "linear":
            return StateCache(max_len)
        return KVCache(
            self.config.n_layers,
            batch,
            self.config.n_kv_heads,
            max_len,
            self.config.head_size,
            dtype=self.compute_dtype(),
            device=self.embedding.weight.device,
        )

    @property
    def streams(self) -> bool:
        """Whether text may go on beyond ``max_seq_len``: windows everywhere, relative positions."""
        return self.window is not None and all(self.windowed) and self.position.relative

    def new_streaming_cache(self) -> StreamingCache:
        """An empty cache for a stream of any length, of any number of rows.

        Raises:
            ConfigError: a layer has no window, or positions are absolute.
        """
        if self.window is None or not self.streams:
            raise ConfigError(
                f"text beyond max_seq_len={self.config.max_seq_len} needs attention=window in "
                f"all layers and a relative position encoding, not '{self.config.position.name}'"
            )
        return StreamingCache(self.window.size, self.window.n_sinks)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Keep only each block's input for the backward and compute the rest again."""
        self.activation_checkpointing = enabled

    def aux_loss(self) -> Tensor | None:
        """Balance loss of the last forward, summed over layers and weighted; None without experts.

        Add it once a forward to the mean loss of its tokens.
        """
        if self.config.moe is None:
            return None
        losses = [routing.balance_loss() for _, routing in self._routing]
        return self.config.moe.balance_coef * torch.stack(losses).sum() if losses else None

    def moe_load(self) -> dict[str, Tensor]:
        """Share of assignments of each expert in the last forward: ``{"layer.3": load_E}``."""
        return {f"layer.{layer}": routing.load_E.detach() for layer, routing in self._routing}

    def cost(self, seq_len: int) -> Cost:
        """Parameters, and forward FLOPs per token of a sequence of ``seq_len`` tokens."""
        table = self.embedding.weight.numel()
        total = Cost(table, table, table) + self.position.cost(seq_len)
        for block in self.blocks:
            total += block.cost(seq_len)  # type: ignore[operator]
        if self.final_norm is not None:
            total += self.final_norm.cost(seq_len)  # type: ignore[operator]
        own = 0 if self.head is None else self.head.weight.numel()
        flops = 2.0 * table  # the head multiplies by V x D, tied or not
        return total + Cost(own, own, 0, flops, {"head": flops})
