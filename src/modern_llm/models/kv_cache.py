"""What is kept of the tokens so far, for generation one token at a time."""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of all layers; keys are kept with their position worked in.

    Rows may be padded on the left (``pad_B``). A window hides keys by the mask; nothing is
    evicted, so at most ``max_len`` tokens fit.

    Args:
        n_layers: layers.
        batch: rows (B).
        n_kv_heads: key/value heads (K).
        max_len: tokens a row can hold, padding included.
        head_size: width of a head (H).
        dtype: of keys and values.
        device: where they are.

    Attributes:
        length: tokens held so far, padding included; the decoder advances it once a forward.
        pad_B: tokens of left padding of each row, or None.
    """

    def __init__(
        self,
        n_layers: int,
        batch: int,
        n_kv_heads: int,
        max_len: int,
        head_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (n_layers, batch, n_kv_heads, max_len, head_size)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.pad_B: Tensor | None = None

    @property
    def max_len(self) -> int:
        """Tokens a row can hold."""
        return self.k.shape[3]

    def update(self, layer: int, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new tokens of ``layer``; return all its keys and values ``(B, K, S, H)``."""
        end = self.length + k_BKTH.shape[2]
        self.k[layer, :, :, self.length : end] = k_BKTH
        self.v[layer, :, :, self.length : end] = v_BKTH
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but these (int64 indices): finished ones need no more work."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        if self.pad_B is not None:
            self.pad_B = self.pad_B[rows]

    def crop(self, length: int) -> None:
        """Forget all tokens after the first ``length``."""
        self.length = min(self.length, length)


@dataclass
class StreamingCache:
    """Endless generation: the first ``n_sinks`` tokens and the last ``window`` (arXiv:2309.17453).

    Keys are kept before their position is worked in, and positions are indices into the cache
    (sec. 3.2), so that they never exceed ``n_sinks + window``. While no more than that many
    tokens have passed, this equals `KVCache`. Feed at most ``room()`` tokens at a time: beyond
    the capacity that is one.

    Attributes:
        window: recent tokens kept.
        n_sinks: first tokens kept.
        length: tokens held.
        k: keys of each layer, ``(B, K, S, H)``.
        v: values of each layer.
    """

    window: int
    n_sinks: int
    length: int = 0

    def __post_init__(self) -> None:
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}

    @property
    def capacity(self) -> int:
        """Tokens held at most."""
        return self.n_sinks + self.window

    def room(self) -> int:
        """Tokens that the next forward may bring."""
        return max(1, self.capacity - self.length)

    def evict(self) -> int:
        """Make room for one token, before a forward; returns the tokens then held."""
        if self.length == self.capacity:
            for store in (self.k, self.v):
                for layer, x in store.items():
                    sinks, recent = x[:, :, : self.n_sinks], x[:, :, self.n_sinks + 1 :]
                    store[layer] = torch.cat([sinks, recent], 2)
            self.length -= 1
        return self.length

    def update(self, layer: int, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new tokens of ``layer``; return all its keys (not rotated) and values."""
        for store, x in ((self.k, k_BKTH), (self.v, v_BKTH)):
            store[layer] = torch.cat([store[layer], x], 2) if layer in store else x
        return self.k[layer], self.v[layer]

    def keep_rows(self, rows: Tensor) -> Self:
        """Drop all rows but these (int64 indices)."""
        for store in (self.k, self.v):
            store.update({layer: x[rows] for layer, x in store.items()})
        return self


@dataclass
class StateCache:
    """The running sums of linear attention: of fixed size, however many tokens have passed.

    Attributes:
        max_len: tokens a row can pass, padding included.
        length: tokens so far, padding included; the decoder advances it once a forward.
        pad_B: tokens of left padding of each row, or None.
        states: of each layer, sums of ``phi(k) v^T`` ``(B, K, H, H)`` and of ``phi(k)``
            ``(B, K, H)``.
    """

    max_len: int
    length: int = 0
    pad_B: Tensor | None = None  # noqa: N815 - shape suffix
    states: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def seen(self, n_tokens: int, device: torch.device) -> Tensor | None:
        """Bool ``(B, n_tokens)``, False where a new token is padding; None without padding."""
        if self.pad_B is None:
            return None
        index_T = torch.arange(self.length, self.length + n_tokens, device=device)
        return index_T >= self.pad_B[:, None]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but these (int64 indices)."""
        self.states = {layer: (s[rows], z[rows]) for layer, (s, z) in self.states.items()}
        if self.pad_B is not None:
            self.pad_B = self.pad_B[rows]
