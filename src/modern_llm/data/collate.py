"""Batches: frozen tensors that a loader yields and an objective reads.

Shapes: B rows, T tokens. Labels are shifted already: ``labels_BT[b, t]`` is the token that follows
``tokens_BT[b, t]``, or -100 where nothing is learned.
"""
# ruff: noqa: N815 - shape suffixes in field names

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modern_llm.data.store import TokenStore

IGNORE = -100
PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, -1
WIDTH_MULTIPLE = 8  # rows are padded to a multiple, which kernels prefer


class Batch(Protocol):
    """What every batch can do."""

    @property
    def n_tokens(self) -> int:
        """Tokens that are not padding; ask before moving to a GPU, where it waits."""

    def to(self, device: torch.device | str) -> Self:
        """The same batch on ``device``."""


class _Tensors:
    """Moves all tensor fields of a frozen dataclass."""

    def to(self, device: torch.device | str) -> Self:
        """The same batch on ``device``; the copy does not wait where memory is pinned."""
        values = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            moved = isinstance(value, Tensor)
            values[field.name] = value.to(device, non_blocking=True) if moved else value
        return type(self)(**values)


@dataclass(frozen=True)
class TokenBatch(_Tensors):
    """Next-token prediction.

    Attributes:
        tokens_BT: int64 ids.
        labels_BT: int64, the next token, or -100.
        doc_ids_BT: int64 or None; tokens of different documents do not see each other, padding
            is document -1. None: each row is one stretch of text.
        pos_BT: int64 or None; positions within the document, for packed examples.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    doc_ids_BT: Tensor | None = None
    pos_BT: Tensor | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens that are not padding."""
        if self.doc_ids_BT is None:
            return self.tokens_BT.numel()
        return int((self.doc_ids_BT >= 0).sum())


@dataclass(frozen=True)
class AnswerTargets:
    """Where each answer token of a `PairBatch` is predicted, flat over all of them (M tokens).

    Attributes:
        at_M: index into the flattened ``B*T`` positions whose logits predict the token.
        label_M: the token.
        row_M: its row in the batch.
        rejected_M: bool, whether it belongs to the rejected answer.
    """

    at_M: Tensor
    label_M: Tensor
    row_M: Tensor
    rejected_M: Tensor


@dataclass(frozen=True)
class PairBatch(_Tensors):
    """Preference pairs, one row each: ``[prompt][chosen][rejected]``.

    The rejected answer sees the prompt and itself, and its positions go on from the prompt's, so
    one forward pass gives what two rows would, at the prompt's cost once.

    Attributes:
        tokens_BT: int64 ids.
        pos_BT: int64 positions; chosen and rejected both go on from the prompt's end.
        part_BT: int64, 0 prompt, 1 chosen, 2 rejected, -1 padding.
        index_B: int64, the row's index in the store.
    """

    tokens_BT: Tensor
    pos_BT: Tensor
    part_BT: Tensor
    index_B: Tensor

    @property
    def n_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.part_BT != PADDING).sum())

    def mask(self) -> Tensor:
        """Bool ``(B, T, S)``: True where query t may see key s; composes with the causal mask."""
        query_BT1, key_B1S = self.part_BT[:, :, None], self.part_BT[:, None, :]
        return (key_B1S == PROMPT) | (key_B1S == query_BT1)

    def targets(self) -> AnswerTargets:
        """Positions that predict the answers' tokens.

        A token is predicted at the position before it, but for the first rejected token: it
        follows the prompt's last token, not the chosen answer.
        """
        row_M, t_M = (self.part_BT >= CHOSEN).nonzero(as_tuple=True)
        part_M = self.part_BT[row_M, t_M]
        prompt_end_B = (self.part_BT == PROMPT).sum(dim=1) - 1
        first_M = self.part_BT[row_M, t_M - 1] != part_M
        before_M = torch.where(first_M, prompt_end_B[row_M], t_M - 1)
        at_M = row_M * self.tokens_BT.shape[1] + before_M
        return AnswerTargets(at_M, self.tokens_BT[row_M, t_M], row_M, part_M == REJECTED)


@dataclass(frozen=True)
class AnswerBatch(_Tensors):
    """Graded solutions for the verifier, right-padded.

    Attributes:
        tokens_BT: int64 ids of prompt and answer.
        labels_BT: int64 next token inside the answer, -100 elsewhere.
        answer_BT: bool, True on answer tokens, EOS included.
        label_B: float32, 1 for a right solution.
        lengths_B: int64 tokens of each row without padding.
        index_B: int64, the row's index in the store.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    answer_BT: Tensor
    label_B: Tensor
    lengths_B: Tensor
    index_B: Tensor

    @property
    def n_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.lengths_B.sum())


def _width(lengths: NDArray[np.int64]) -> int:
    return int(-(-lengths.max() // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)


def _gather(store: TokenStore, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """Padded tokens ``(B, T)``, positions in the row ``(1, T)`` and segment ends ``(B, k)``."""
    store.shards.note_reads(len(rows))
    bounds = store.bounds(rows)
    ends = bounds[:, 1:] - bounds[:, :1]
    t = np.arange(_width(ends[:, -1]))[None, :]
    tokens = np.full((len(rows), t.shape[1]), store.pad_id, dtype=np.int64)
    for row, (begin, end) in zip(tokens, bounds[:, [0, -1]].tolist(), strict=True):
        row[: end - begin] = store.shards.span(begin, end)
    return tokens, t, ends


def collate_pairs(store: TokenStore, rows: Sequence[int] | NDArray[np.int64]) -> PairBatch:
    """Rows of a pair store (prompt, chosen, rejected) as one batch."""
    index = np.asarray(rows, dtype=np.int64)
    tokens, t, ends = _gather(store, index)
    prompt, chosen, rejected = (ends[:, i : i + 1] for i in range(3))
    part = np.select(
        [t < prompt, t < chosen, t < rejected], [PROMPT, CHOSEN, REJECTED], default=PADDING
    )
    pos = np.where(part == REJECTED, t - (chosen - prompt), np.where(part == PADDING, 0, t))
    return PairBatch(*(torch.from_numpy(a) for a in (tokens, pos, part, index)))


def collate_answers(store: TokenStore, rows: Sequence[int] | NDArray[np.int64]) -> AnswerBatch:
    """Rows of a verifier store (prompt, answer; column ``label``) as one batch."""
    index = np.asarray(rows, dtype=np.int64)
    tokens, t, ends = _gather(store, index)
    prompt, end = ends[:, :1], ends[:, 1:2]
    answer = (t >= prompt) & (t < end)
    following = np.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
    labels = np.where((t >= prompt - 1) & (t < end - 1), following, IGNORE)
    label = store.columns["label"][index].astype(np.float32)
    arrays = (tokens, labels, answer, label, end[:, 0], index)
    return AnswerBatch(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays))
