"""Rows of a fixed length: consecutive blocks of text, and examples packed side by side."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from modern_llm.data.collate import IGNORE
from modern_llm.data.order import Ints, permuted
from modern_llm.data.store import TokenStore
from modern_llm.errors import ConfigError

Arrays = tuple[Ints, Ints, Ints, Ints]  # tokens, labels, document ids, positions; each (rows, T)


class Rows(Protocol):
    """Rows of one length, addressed by number."""

    def __len__(self) -> int: ...

    def read(self, rows: Ints) -> Arrays:
        """The rows' tokens, labels, document ids (-1 padding) and positions, ``(rows, T)``."""


class TextRows:
    """A text store cut into blocks of ``seq_len`` tokens, each with the next token as label.

    The last block is padded, so that every token but the store's first is a label once (with
    ``doc_mask``: but each document's first).

    Args:
        store: segment "text".
        seq_len: T.
        doc_mask: number the documents of a block, and leave out labels across their borders;
            else a block is one stretch of text.
    """

    def __init__(self, store: TokenStore, seq_len: int, *, doc_mask: bool) -> None:
        self.store, self.seq_len, self.doc_mask = store, seq_len, doc_mask
        self.n = -(-(store.n_tokens - 1) // seq_len)

    def __len__(self) -> int:
        return self.n

    def read(self, rows: Ints) -> Arrays:
        """See `Rows`."""
        store, width = self.store, self.seq_len
        store.shards.note_reads(len(rows))
        at = rows[:, None] * width + np.arange(width + 1)
        real = at < store.n_tokens
        stream = np.full(at.shape, store.pad_id, dtype=np.int64)
        for ids, begin in zip(stream, at[:, 0].tolist(), strict=True):
            end = min(begin + width + 1, store.n_tokens)
            ids[: end - begin] = store.shards.span(begin, end)
        learned = real[:, 1:]
        if self.doc_mask:
            docs, pos = self._documents(at)
            learned = learned & (docs[:, 1:] == docs[:, :-1])
            docs = docs - docs[:, :1]
        else:
            docs, pos = np.zeros_like(at), np.broadcast_to(np.arange(width + 1), at.shape)
        docs = np.where(real, docs, -1)
        labels = np.where(learned, stream[:, 1:], IGNORE)
        return stream[:, :-1], labels, docs[:, :-1], pos[:, :-1]

    def _documents(self, at: Ints) -> tuple[Ints, Ints]:
        """Document of each token of the store, and the token's position in it within the row."""
        docs = np.empty_like(at)
        begins = np.empty_like(at)
        for row, positions in enumerate(at):
            first, near = self.store.shards.documents(int(positions[0]), int(positions[-1]))
            local = np.searchsorted(near, positions, "right") - 1
            docs[row] = local + first
            begins[row] = near[local]
        return docs, at - np.maximum(begins, at[:, :1])


class PackedRows:
    """Prompt-and-answer examples packed into rows of ``seq_len``, each its own document.

    Best fit in an order fixed by ``seed``; the answer (with ``<|eos|>``) is learned, the prompt is
    not.

    Args:
        store: segments "prompt" and "answer".
        seq_len: T; no example may be longer.
        seed: decides which examples share a row.
    """

    def __init__(self, store: TokenStore, seq_len: int, *, seed: int) -> None:
        self.store, self.seq_len = store, seq_len
        lengths = store.lengths().sum(axis=1)
        if lengths.max() > seq_len:
            raise ConfigError(
                f"an example has {lengths.max()} tokens, more than seq_len={seq_len}; "
                "prepare the data with max_tokens of seq_len at most"
            )
        self.examples, self.starts = pack(lengths, seq_len, seed)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def read(self, rows: Ints) -> Arrays:
        """See `Rows`."""
        store, width = self.store, self.seq_len
        store.shards.note_reads(len(rows))
        counts = self.starts[rows + 1] - self.starts[rows]
        first = np.cumsum(counts) - counts  # of each row among the examples below
        examples = np.concatenate(
            [self.examples[self.starts[r] : self.starts[r + 1]] for r in rows]
        )
        bounds = store.bounds(examples)
        lengths = bounds[:, 2] - bounds[:, 0]
        before = np.cumsum(lengths) - lengths  # tokens in front of each example
        row_of = np.repeat(np.arange(len(rows)), counts)

        of = np.repeat(np.arange(len(examples)), lengths)  # example of each token
        within = np.arange(len(of)) - before[of]
        place = row_of[of] * width + before[of] - before[first][row_of[of]] + within
        spans = (store.shards.span(begin, end) for begin, end in bounds[:, [0, 2]].tolist())
        ids = np.concatenate(list(spans)).astype(np.int64)
        answer_from = (bounds[:, 1] - bounds[:, 0])[of] - 1  # here the first answer token is next
        learned = (within >= answer_from) & (within < lengths[of] - 1)

        size = len(rows) * width
        tokens = np.full(size, store.pad_id, dtype=np.int64)
        labels = np.full(size, IGNORE, dtype=np.int64)
        docs = np.full(size, -1, dtype=np.int64)
        pos = np.zeros(size, dtype=np.int64)
        tokens[place] = ids
        labels[place] = np.where(learned, np.roll(ids, -1), IGNORE)
        docs[place] = of - first[row_of[of]]
        pos[place] = within
        shape = (len(rows), width)
        return tokens.reshape(shape), labels.reshape(shape), docs.reshape(shape), pos.reshape(shape)


def pack(lengths: NDArray[np.int64], width: int, seed: int) -> tuple[Ints, Ints]:
    """Best-fit packing of examples into rows of ``width`` tokens.

    Args:
        lengths: tokens of each example, at most ``width``.
        width: tokens of a row.
        seed: decides the order in which examples are placed.

    Returns:
        Examples in row order, and where each row begins among them (one more entry than rows).
    """
    order = permuted(np.arange(len(lengths)), len(lengths), seed)
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(width + 1)]  # by room left
    rooms = 0  # bit i: some row has room i
    for example, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length << length
        if fitting:
            room = (fitting & -fitting).bit_length() - 1  # the tightest fit
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms &= ~(1 << room)
        else:
            room, row = width, len(rows)
            rows.append([])
        rows[row].append(example)
        if left := room - length:
            open_rows[left].append(row)
            rooms |= 1 << left
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return np.array([e for row in rows for e in row], dtype=np.int64), starts
