"""Encoding rows in several processes: batches go out and come back in their order."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from modern_llm.data.encoders import Encode, Row
from modern_llm.data.writer import Encoded, encoded
from modern_llm.errors import DataError

T = TypeVar("T")
BATCH_ROWS = 256  # encoded in one call of the tokenizer, or fewer:
BATCH_CHARS = 1 << 20  # enough for its own threads
JOB_CHARS = 1 << 18  # little enough for processes to end together
ALONE_BATCHES = 2  # so few are encoded before a process has started
AHEAD = 3  # batches a process that are read before the first of them is back


@dataclass(frozen=True)
class Batch:
    """What became of some rows.

    Attributes:
        records: those that were kept.
        rows: how many were given.
        dropped: how many were left out, by reason.
    """

    records: Encoded
    rows: int
    dropped: dict[str, int]


def encode_rows(
    rows: Iterable[Row], encode: Encode, dtype: np.dtype[Any], n_segments: int, *, jobs: int
) -> Iterator[Batch]:
    """Encode rows in batches, in their order.

    Args:
        rows: read here, a little ahead of what is yielded.
        encode: can be pickled when there are several jobs.
        dtype: of a token.
        n_segments: of a record.
        jobs: processes; 1 is this one, where the tokenizer has its own threads.

    Raises:
        DataError: as ``rows`` and ``encode``; a process was killed.
    """
    batches = grouped(rows, BATCH_ROWS, _chars, BATCH_CHARS if jobs == 1 else JOB_CHARS)
    work = partial(_encoded, encode, dtype, n_segments)
    first = list(itertools.islice(batches, ALONE_BATCHES + 1))
    if jobs == 1 or len(first) <= ALONE_BATCHES:
        yield from map(work, itertools.chain(first, batches))
        return
    context = multiprocessing.get_context("spawn")  # forked threads of the tokenizer would hang
    pool = ProcessPoolExecutor(jobs, context, _begin, (work,))
    try:
        waiting: deque[Future[Batch]] = deque()
        for batch in itertools.chain(first, batches):
            waiting.append(pool.submit(_work, batch))
            if len(waiting) > AHEAD * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a process that encodes was killed, perhaps for memory; whole shards are kept: run the "
            "same command again, with fewer --jobs if there is little memory"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encoded(encode: Encode, dtype: np.dtype[Any], n_segments: int, rows: list[Row]) -> Batch:
    records, dropped = [], dict[str, int]()
    for record in encode(rows):
        if isinstance(record, str):
            dropped[record] = dropped.get(record, 0) + 1
        else:
            records.append(record)
    return Batch(encoded(records, dtype, n_segments), len(rows), dropped)


_own_work: list[Callable[[list[Row]], Batch]] = []  # of a process of the pool


def _begin(work: Callable[[list[Row]], Batch]) -> None:
    """Make ready a process of the pool: it ends with its parent, also when that is killed."""
    # One thread a process. Without the tokenizer's own pool of threads it is a fifth slower.
    os.environ.update({"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends us
    _own_work.append(work)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(rows: list[Row]) -> Batch:
    return _own_work[0](rows)


def _chars(row: Row) -> int:
    return sum(len(value) for value in row.values() if isinstance(value, str))


def grouped(
    rows: Iterable[T],
    size: int,
    chars: Callable[[T], int] = lambda _: 0,
    max_chars: int = BATCH_CHARS,
) -> Iterator[list[T]]:
    """Lists of up to ``size`` rows and about ``max_chars`` characters."""
    batch: list[T] = []
    seen = 0
    for row in rows:
        batch.append(row)
        seen += chars(row)
        if len(batch) >= size or seen >= max_chars:
            yield batch
            batch, seen = [], 0
    if batch:
        yield batch
