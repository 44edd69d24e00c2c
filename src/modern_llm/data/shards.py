"""Shards of a token store: files of whole records, mapped when they are read.

Tokens and records are numbered through all shards; a caller does not see where one ends. The
offsets in a shard's file count from its own first token.
"""

import mmap
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

MAX_MAPPED = 128  # files mapped at once: each holds an open file, and often 1024 are allowed
RELEASE_READS = 1024  # records read between two releases of mapped memory
Ints = NDArray[np.int64]


def tokens_file(shard: int) -> str:
    """File of a shard's tokens."""
    return f"tokens-{shard:05d}.bin"


def offsets_file(shard: int) -> str:
    """File of a shard's offsets, int64 ``(rows, segments + 1)``."""
    return f"offsets-{shard:05d}.bin"


def column_file(shard: int, column: str) -> str:
    """File of a number that each of a shard's records carries, float32."""
    return f"column-{column}-{shard:05d}.bin"


def shard_files(shard: int, columns: Sequence[str]) -> list[str]:
    """All files of a shard."""
    return [tokens_file(shard), offsets_file(shard), *(column_file(shard, c) for c in columns)]


class Shards:
    """Reads tokens and records of all shards of a folder.

    Args:
        folder: where the files are; none is opened before it is read.
        sizes: rows and tokens of each shard, in order.
        dtype: of a token.
        n_segments: of a record.
    """

    def __init__(
        self,
        folder: Path,
        sizes: Sequence[Mapping[str, int]],
        dtype: np.dtype[Any],
        n_segments: int,
    ) -> None:
        self.folder, self.dtype, self.n_segments = folder, dtype, n_segments
        self.rows = [size["rows"] for size in sizes]
        self.first_token = [0, *np.cumsum([s["tokens"] for s in sizes], dtype=np.int64).tolist()]
        self.first_row = np.cumsum([0, *self.rows], dtype=np.int64)
        self._mapped: OrderedDict[str, NDArray[Any]] = OrderedDict()
        self._reads = 0

    def __len__(self) -> int:
        return len(self.rows)

    def span(self, begin: int, end: int) -> NDArray[Any]:
        """Tokens from ``begin`` to before ``end``, of one shard or several."""
        shard = self._shard_of(begin)
        first = self.first_token[shard]
        piece = self._tokens(shard)[begin - first : end - first]
        if len(piece) == end - begin:
            return piece
        pieces, at = [piece], begin + len(piece)
        while at < end:
            shard += 1
            first = self.first_token[shard]
            pieces.append(self._tokens(shard)[: end - first])
            at += len(pieces[-1])
        return np.concatenate(pieces)

    def bounds(self, rows: Ints) -> Ints:
        """Where the segments of records begin and the last ends, ``(n, segments + 1)``."""
        if len(self) == 1:
            return np.asarray(self.offsets(0)[rows])
        found = np.empty((len(rows), self.n_segments + 1), dtype=np.int64)
        shard_of = np.searchsorted(self.first_row, rows, "right") - 1
        for shard in np.unique(shard_of).tolist():
            here = shard_of == shard
            local = self.offsets(shard)[rows[here] - self.first_row[shard]]
            found[here] = local + self.first_token[shard]
        return found

    def documents(self, first: int, last: int) -> tuple[int, Ints]:
        """The record that holds token ``first``, and where it and all up to ``last`` begin."""
        number, begins = 0, list[Ints]()
        for shard in range(self._shard_of(first), self._shard_of(last) + 1):
            base = self.first_token[shard]
            starts = self.offsets(shard)[:, 0]
            low = max(0, int(np.searchsorted(starts, first - base, "right")) - 1)
            high = int(np.searchsorted(starts, last - base, "right"))
            if not begins:
                number = int(self.first_row[shard]) + low
            begins.append(starts[low:high] + base)
        return number, np.concatenate(begins)

    def offsets(self, shard: int) -> Ints:
        """Offsets of a shard, from its own first token."""
        shape = (self.rows[shard], self.n_segments + 1)
        return self._map(offsets_file(shard), np.int64, shape)

    def column(self, shard: int, name: str) -> NDArray[np.float32]:
        """A column of a shard."""
        return self._map(column_file(shard, name), np.float32, (self.rows[shard],))

    def note_reads(self, n: int) -> None:
        """Count ``n`` scattered reads; now and then give the mapped pages back.

        Pages of a mapped file count as this process's memory once they were touched. They stay in
        the system's cache, so reading them again is cheap.
        """
        self._reads += n
        if self._reads >= RELEASE_READS:
            self._reads = 0
            for array in self._mapped.values():
                mapped: mmap.mmap = array._mmap  # type: ignore[attr-defined]
                mapped.madvise(mmap.MADV_DONTNEED)

    def _tokens(self, shard: int) -> NDArray[Any]:
        size = self.first_token[shard + 1] - self.first_token[shard]
        return self._map(tokens_file(shard), self.dtype, (size,))

    def _shard_of(self, token: int) -> int:
        """The shard that holds a token; the last one for those after the end."""
        return min(bisect_right(self.first_token, token), len(self)) - 1

    def _map(self, name: str, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
        """A file's content; the one that was read longest ago is closed when there are many."""
        array = self._mapped.get(name)
        if array is None:
            if 0 in shape:
                return np.empty(shape, dtype)  # an empty file cannot be mapped
            array = np.memmap(self.folder / name, dtype, "r", shape=shape)
            if len(self._mapped) >= MAX_MAPPED:
                self._mapped.popitem(last=False)
            self._mapped[name] = array
        elif len(self._mapped) == MAX_MAPPED:
            self._mapped.move_to_end(name)
        return array


class Tokens:
    """All tokens of a store as one sequence; a slice of it is an array."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self.dtype = shards.dtype

    def __len__(self) -> int:
        return int(self._shards.first_token[-1])

    @overload
    def __getitem__(self, i: int) -> int: ...
    @overload
    def __getitem__(self, i: slice) -> NDArray[Any]: ...
    def __getitem__(self, i: int | slice) -> int | NDArray[Any]:
        if isinstance(i, int):
            at = range(len(self))[i]
            return int(self._shards.span(at, at + 1)[0])
        begin, end, step = i.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens are read in order, not in steps of {step}")
        return self._shards.span(begin, max(begin, end))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """All of them in memory: for small stores."""
        return np.array(self[:], self.dtype if dtype is None else dtype)

    def tolist(self) -> list[int]:
        """All of them in memory: for small stores."""
        ids: list[int] = self[:].tolist()
        return ids
