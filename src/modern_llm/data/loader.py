"""Loaders: the micro-batches of a step as a pure function of (seed, step, ranks).

Rows lie in one endless sequence of global slots; step ``s`` takes slots ``s * batch_size`` and on,
whatever the number of ranks, and rank r of W takes every W-th of them. There is no state, so a
resumed run goes on where it stopped without anything to save.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar, overload

import numpy as np
import torch

from modern_llm.config.schema import MIN_SHARE, given_shares
from modern_llm.data.collate import Batch, TokenBatch
from modern_llm.data.order import Ints, epoch_order, permuted
from modern_llm.data.packing import PackedRows, Rows, TextRows
from modern_llm.data.store import TokenStore
from modern_llm.errors import ConfigError
from modern_llm.runtime.artifacts import sha256_json
from modern_llm.runtime.ranks import Ranks
from modern_llm.runtime.seeding import derive_seed

PATTERN_SLOTS = round(1 / MIN_SHARE)  # a mixture is exact over this many rows

B = TypeVar("B", bound=Batch)


class Loader(Protocol[B]):
    """What the Trainer needs of a loader."""

    fingerprint: str  # hash of the data and of all that decides its order
    steps_per_epoch: int  # optimizer steps until every example was seen

    def batches(self, step: int) -> Sequence[B]:
        """All micro-batches of optimizer step ``step`` (from 0) of this rank."""

    def one_pass(self) -> "Batches[B]":
        """Every row once in a fixed order, the same on every rank."""


class Batches(Sequence[B], Generic[B]):
    """Batches that are made when they are asked for, as often as they are asked for."""

    def __init__(self, rows: Sequence[Ints], make: Callable[[Ints], B]) -> None:
        self.groups, self.make = rows, make

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, i: int) -> B: ...
    @overload
    def __getitem__(self, i: slice) -> "Batches[B]": ...
    def __getitem__(self, i: int | slice) -> "B | Batches[B]":
        if isinstance(i, slice):
            return Batches(self.groups[i], self.make)
        return self.make(self.groups[i])

    def __iter__(self) -> Iterator[B]:
        return (self.make(rows) for rows in self.groups)


def validation_batches(loader: Loader[B]) -> Batches[B]:
    """The fixed validation pass of a loader's data: each token once, the order never changes."""
    return loader.one_pass()


def check_sizes(batch_size: int, micro_batch_size: int, ranks: Ranks) -> None:
    """Refuse a batch that does not divide into micro-batches on every rank.

    Raises:
        ConfigError: names the numbers and sizes that work.
    """
    per_step = micro_batch_size * ranks.world_size
    if batch_size % per_step:
        near = max(per_step, round(batch_size / per_step) * per_step)
        own = batch_size // ranks.world_size
        way_out = f"use batch_size={near}, for example"
        if own * ranks.world_size == batch_size:  # the training need not change
            fits = max(m for m in range(1, min(own, micro_batch_size) + 1) if own % m == 0)
            way_out = f"use micro_batch_size={fits}, or batch_size={near}"
        raise ConfigError(
            f"training.batch_size={batch_size} is not a multiple of micro_batch_size x ranks = "
            f"{micro_batch_size} x {ranks.world_size}; {way_out}"
        )


class _StepLoader(ABC, Generic[B]):
    """Slots of a step, shared over ranks and micro-batches; subclasses map slots to rows."""

    def __init__(self, batch_size: int, micro_batch_size: int, ranks: Ranks) -> None:
        check_sizes(batch_size, micro_batch_size, ranks)
        self.batch_size, self.micro_batch_size, self.ranks = batch_size, micro_batch_size, ranks

    def rows(self, step: int) -> Ints:
        """All rows of a step on all ranks, in order."""
        return self._rows_of(step * self.batch_size + np.arange(self.batch_size))

    def batches(self, step: int) -> Batches[B]:
        """All micro-batches of optimizer step ``step`` (from 0) of this rank."""
        own = self.rows(step)[self.ranks.rank :: self.ranks.world_size]
        return Batches(np.split(own, len(own) // self.micro_batch_size), self._make)

    def _fixed_pass(self, rows: Ints) -> Batches[B]:
        cuts = range(self.micro_batch_size, len(rows), self.micro_batch_size)
        groups = np.split(rows, list(cuts))
        return Batches(groups, self._make)

    @abstractmethod
    def _rows_of(self, slots: Ints) -> Ints:
        """Rows of global slots."""

    @abstractmethod
    def _make(self, rows: Ints) -> B:
        """The batch of some rows."""


class _MixtureLoader(_StepLoader[TokenBatch]):
    """Rows of several parts in fixed shares; each part goes through its own epochs.

    A row number is the part's first number plus the row in the part.
    """

    def __init__(
        self,
        parts: Sequence[Rows],
        weights: Sequence[float] | None,
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        ranks: Ranks,
        with_docs: bool,
    ) -> None:
        super().__init__(batch_size, micro_batch_size, ranks)
        self.parts, self.seed, self.with_docs = parts, seed, with_docs
        self.sizes = np.array([len(part) for part in parts], dtype=np.int64)
        self.first = np.cumsum(self.sizes) - self.sizes
        self.total = int(self.sizes.sum())
        self.pattern = None if weights is None else _pattern(weights, seed)
        self.steps_per_epoch = -(-self.total // batch_size)

    def one_pass(self) -> Batches[TokenBatch]:
        """Every row, and so every token, once, part after part."""
        return self._fixed_pass(np.arange(self.total))

    def _rows_of(self, slots: Ints) -> Ints:
        if self.pattern is None:
            return epoch_order(slots, self.total, self.seed)
        rows = np.empty_like(slots)
        part_of = self.pattern[slots % PATTERN_SLOTS]
        for p in np.unique(part_of):
            here = part_of == p
            before = np.cumsum(self.pattern == p)  # slots of the part up to each of the pattern
            round_, place = np.divmod(slots[here], PATTERN_SLOTS)
            own = round_ * before[-1] + before[place] - 1
            order_seed = derive_seed("part", self.seed, int(p))
            rows[here] = self.first[p] + epoch_order(own, int(self.sizes[p]), order_seed)
        return rows

    def _make(self, rows: Ints) -> TokenBatch:
        part_of = np.searchsorted(self.first, rows, "right") - 1
        used = np.unique(part_of)
        if len(used) == 1:
            arrays = self.parts[used[0]].read(rows - self.first[used[0]])
        else:
            pieces = [self.parts[p].read(rows[part_of == p] - self.first[p]) for p in used]
            back = np.argsort(np.argsort(part_of, kind="stable"), kind="stable")
            arrays = tuple(np.concatenate(column)[back] for column in zip(*pieces, strict=True))
        used_arrays = arrays if self.with_docs else arrays[:2]
        return TokenBatch(*(torch.from_numpy(np.ascontiguousarray(a)) for a in used_arrays))


class TextLoader(_MixtureLoader):
    """Blocks of pretraining text from one store or a weighted mixture.

    Args:
        stores: segment "text".
        weights: as `given_shares` reads them; stores with a ``None`` share the rest in proportion
            to their tokens, each at least one block in `PATTERN_SLOTS`. All ``None``: every block
            of all stores once an epoch.
        seq_len: T.
        batch_size: rows of a step on all ranks together.
        micro_batch_size: rows of one forward pass on one rank.
        seed: decides the order.
        doc_mask: whether documents in one block are kept apart.
        ranks: this process among all.

    Raises:
        ConfigError: the batch does not divide, or the weights are no mixture.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        weights: Sequence[float | None],
        *,
        seq_len: int,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        doc_mask: bool = False,
        ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    ) -> None:
        shares = mixture_weights(stores, weights)
        super().__init__(
            [TextRows(store, seq_len, doc_mask=doc_mask) for store in stores],
            shares,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            seed=seed,
            ranks=ranks,
            with_docs=doc_mask,
        )
        prints = [store.fingerprint for store in stores]
        decides: list[object] = [shares or list(weights), seq_len, batch_size, seed, doc_mask]
        self.fingerprint = sha256_json(["text", prints, decides])


class PackedLoader(_MixtureLoader):
    """Prompt-and-answer examples packed into rows, with a share of pretraining text if wanted.

    Args:
        store: segments "prompt" and "answer".
        seq_len: T; no example may be longer.
        batch_size: rows of a step on all ranks together.
        micro_batch_size: rows of one forward pass on one rank.
        seed: decides the packing and the order.
        ranks: this process among all.
        replay: a text store whose blocks are mixed in, or ``None``.
        replay_share: share of the rows that come from ``replay``.

    Raises:
        ConfigError: the batch does not divide, or an example is too long.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        seq_len: int,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        ranks: Ranks = Ranks(),  # noqa: B008 - frozen
        replay: TokenStore | None = None,
        replay_share: float = 0.0,
    ) -> None:
        packed = PackedRows(store, seq_len, seed=seed)
        mixed = replay is not None and replay_share > 0
        parts: list[Rows] = [packed]
        if mixed and replay is not None:
            parts.append(TextRows(replay, seq_len, doc_mask=True))
        super().__init__(
            parts,
            [1 - replay_share, replay_share] if mixed else None,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            seed=seed,
            ranks=ranks,
            with_docs=True,
        )
        own_rows = batch_size * (1 - replay_share if mixed else 1)
        self.steps_per_epoch = int(np.ceil(len(packed) / own_rows))
        replayed = [replay.fingerprint, replay_share] if mixed and replay is not None else None
        decides = [seq_len, batch_size, seed, replayed]
        self.fingerprint = sha256_json(["packed", store.fingerprint, decides])
        self._n_packed = len(packed)

    def one_pass(self) -> Batches[TokenBatch]:
        """Every example once, in row order, without the replayed text."""
        return self._fixed_pass(np.arange(self._n_packed))


class BucketLoader(_StepLoader[B]):
    """Examples in random order; those of one step are dealt to micro-batches by length.

    So padding is small where a step has several micro-batches, and a step is still a fair draw.
    Steps of like length would be steps of like label where the two go together, as they do in
    preference pairs and in graded solutions.

    Args:
        store: any store whose records ``collate`` understands.
        batch_size: records of a step on all ranks together.
        micro_batch_size: records of one forward pass on one rank.
        seed: decides the order.
        ranks: this process among all.
        collate: makes a batch of record numbers, such as `collate_pairs`.

    Raises:
        ConfigError: the batch does not divide.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        collate: Callable[[TokenStore, Ints], B],
        ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(batch_size, micro_batch_size, ranks)
        self.store, self.seed, self.collate = store, seed, collate
        self.lengths = store.lengths().sum(axis=1)
        self.steps_per_epoch = -(-len(store) // batch_size)
        self.fingerprint = sha256_json(["bucket", store.fingerprint, batch_size, seed])

    def one_pass(self) -> Batches[B]:
        """Every record once, the shortest first."""
        return self._fixed_pass(np.argsort(self.lengths, kind="stable"))

    def _rows_of(self, slots: Ints) -> Ints:
        n = len(self.store)
        rows = epoch_order(slots, n, self.seed)
        return rows[np.lexsort((self.lengths[rows], slots // n))]  # epoch by epoch

    def _make(self, rows: Ints) -> B:
        return self.collate(self.store, rows)


def mixture_weights(
    stores: Sequence[TokenStore], weights: Sequence[float | None]
) -> list[float] | None:
    """Shares that sum to 1, or ``None`` when all go in proportion to size.

    Raises:
        ConfigError: not one weight a store, or as `given_shares`.
    """
    if len(stores) != len(weights) or not stores:
        raise ConfigError(f"{len(weights)} weights for {len(stores)} data sources")
    if all(weight is None for weight in weights):
        return None
    try:
        shares = given_shares(weights)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    pairs = list(zip(stores, shares, strict=True))
    rest = 1.0 - sum(share for share in shares if share is not None)
    tokens = sum(store.n_tokens for store, share in pairs if share is None)
    return [rest * store.n_tokens / tokens if share is None else share for store, share in pairs]


def _pattern(weights: Sequence[float], seed: int) -> Ints:
    """Which part each of `PATTERN_SLOTS` slots takes: shares by largest remainder, then mixed."""
    shares = np.asarray(weights) / sum(weights) * PATTERN_SLOTS
    slots = np.maximum(np.floor(shares), 1).astype(np.int64)
    while (missing := PATTERN_SLOTS - int(slots.sum())) != 0:
        gap = shares - slots if missing > 0 else np.where(slots > 1, shares - slots, np.inf)
        slots[int(np.argmax(gap) if missing > 0 else np.argmin(gap))] += np.sign(missing)
    ordered = np.repeat(np.arange(len(slots)), slots)
    return ordered[permuted(np.arange(PATTERN_SLOTS), PATTERN_SLOTS, derive_seed("mix", seed))]
