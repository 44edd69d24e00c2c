"""Which keys a query may see: rules that compose into one additive bias, or into none at all.

A window is cut into pieces, so that no product is made of keys that all queries of one have left
behind.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A query sees the last ``size`` tokens, itself included, and the first ``n_sinks``.

    Sinks that stay visible are those of arXiv:2309.17453. Both are counted in positions, so
    each packed document, and each left-padded row, has its own.
    """

    size: int
    n_sinks: int = 0

    def visible(self, pos_BT: Tensor, pos_BS: Tensor) -> Tensor:
        """Bool ``(B, T, S)``: inside the window, or a sink."""
        near_BTS = pos_BT[:, :, None] - pos_BS[:, None, :] < self.size
        return near_BTS | (pos_BS < self.n_sinks)[:, None, :] if self.n_sinks else near_BTS

    @property
    def block(self) -> int:
        """Queries of a piece: fewer make slower products, more take in more keys beside these."""
        return max(128, self.size // 4)

    def pieces(self, n_queries: int, n_keys: int) -> list["Piece"]:
        """The last ``n_queries`` of ``n_keys`` tokens, cut at multiples of `block`."""
        starts = range((n_keys - n_queries) // self.block * self.block, n_keys, self.block)
        found = []
        for at in starts:
            start, end = max(at, n_keys - n_queries), min(at + self.block, n_keys)
            first_key = start - self.size + 1
            if first_key <= self.n_sinks:
                found.append(Piece(start, end))
            else:
                found.append(Piece(start, end, first_key, self.n_sinks))
        return found


@dataclass(frozen=True)
class Piece:
    """Queries in a row, and all keys that one of them sees through a window; counted from key 0.

    Attributes:
        start: first query.
        end: one past the last query, and past the last key.
        first_key: first key in the window of the first query; 0 where no key is left out.
        n_sinks: so many first keys of the text come before ``first_key``.
        bias: added to the logits, broadcastable to ``(B, N, end - start, n_keys)``.
    """

    start: int
    end: int
    first_key: int = 0
    n_sinks: int = 0
    bias: Tensor | None = None

    @property
    def n_queries(self) -> int:
        """Tokens from ``start`` to ``end``."""
        return self.end - self.start

    @property
    def n_keys(self) -> int:
        """Keys that are multiplied, sinks included."""
        return self.n_sinks + self.end - self.first_key

    def keys_of(self, x_BS: Tensor) -> Tensor:
        """Columns of the keys of this piece, ``(B, n_keys)``."""
        return torch.cat([x_BS[:, : self.n_sinks], x_BS[:, self.first_key : self.end]], 1)


def visible_keys(
    pos_BT: Tensor,
    pos_BS: Tensor,
    *,
    window: Window | None = None,
    doc_ids_BS: Tensor | None = None,
    mask_BTS: Tensor | None = None,
    pad_B: Tensor | None = None,
) -> Tensor:
    """Bool ``(B or 1, T, S)``; True where a query may see a key.

    The T queries are the last T of the S tokens, by index: this offset, not a top-left
    triangle, is what a cache needs (pytorch#108108). A token always sees itself, so that no row
    of a softmax is empty (padding rows would be NaN).

    Args:
        pos_BT: positions of the queries.
        pos_BS: positions of the keys.
        window: sliding window with sinks.
        doc_ids_BS: documents of the keys; tokens of different ones do not see each other.
        mask_BTS: True = may see; composes with all other rules.
        pad_B: tokens of left padding of each row; nobody sees them.
    """
    n_queries, n_keys = pos_BT.shape[1], pos_BS.shape[1]
    key_S = torch.arange(n_keys, device=pos_BT.device)
    query_T = key_S[n_keys - n_queries :]
    visible = (key_S <= query_T[:, None])[None]
    if window is not None:
        visible = visible & window.visible(pos_BT, pos_BS)
    if doc_ids_BS is not None:
        doc_ids_BT = doc_ids_BS[:, n_keys - n_queries :]
        visible = visible & (doc_ids_BT[:, :, None] == doc_ids_BS[:, None, :])
    if mask_BTS is not None:
        visible = visible & mask_BTS
    if pad_B is not None:
        visible = visible & (key_S >= pad_B[:, None])[:, None, :]
    return visible | (key_S == query_T[:, None])


def additive(visible_BTS: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, 1, T, S)``: 0 where visible, minus infinity elsewhere."""
    zero = torch.zeros((), dtype=dtype, device=visible_BTS.device)
    return torch.where(visible_BTS, zero, float("-inf")).unsqueeze(1)


def document_positions(doc_ids_BT: Tensor) -> Tensor:
    """Positions that restart where the document changes: ``(B, T)`` int64."""
    index_T = torch.arange(doc_ids_BT.shape[1], device=doc_ids_BT.device)
    starts = torch.ones_like(doc_ids_BT, dtype=torch.bool)
    starts[:, 1:] = doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1]
    return index_T - torch.where(starts, index_T, 0).cummax(dim=1).values
