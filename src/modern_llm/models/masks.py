"""Which keys a query may see: rules that compose into one additive bias, or into none at all."""

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


def visible_keys(
    pos_BT: Tensor,
    pos_BS: Tensor,
    *,
    window: Window | None = None,
    doc_ids_BT: Tensor | None = None,
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
        doc_ids_BT: tokens of different documents do not see each other (needs T = S).
        mask_BTS: True = may see; composes with all other rules.
        pad_B: tokens of left padding of each row; nobody sees them.
    """
    n_queries, n_keys = pos_BT.shape[1], pos_BS.shape[1]
    key_S = torch.arange(n_keys, device=pos_BT.device)
    query_T = key_S[n_keys - n_queries :]
    visible = (key_S <= query_T[:, None])[None]
    if window is not None:
        visible = visible & window.visible(pos_BT, pos_BS)
    if doc_ids_BT is not None:
        visible = visible & (doc_ids_BT[:, :, None] == doc_ids_BT[:, None, :])
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
