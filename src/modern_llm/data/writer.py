"""Writes a token store shard by shard; one that was stopped goes on behind its whole shards.

Shards are cut between batches of records, and no hash of content depends on where: the store's
fingerprint is that of all tokens and all offsets in a row.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from modern_llm.data.making import current
from modern_llm.data.shards import Ints, column_file, offsets_file, shard_files, tokens_file
from modern_llm.errors import DataError
from modern_llm.runtime.artifacts import fsync_folder, sha256_file, sha256_json, write_json
from modern_llm.runtime.logs import LINE_SECONDS, get_logger

FORMAT = 2
BATCH_RECORDS, BATCH_TOKENS = 1024, 1 << 18  # written at once
MANIFEST = "manifest.json"

log = get_logger(__name__)
Record = tuple[Any, ...]  # one sequence of ids a segment, then one number a column


@dataclass(frozen=True)
class Encoded:
    """Some records as arrays: the segments of all of them side by side.

    Attributes:
        tokens: ids of all segments.
        lengths: tokens of each segment, ``(n, segments)``.
        columns: float32 ``(n, columns)``.
        after: where the reading stands behind these records, as JSON; it is handed back when the
            writing goes on from here.
    """

    tokens: NDArray[Any]
    lengths: Ints
    columns: NDArray[np.float32]
    after: Any = None


def encoded(
    records: Sequence[Record], dtype: DTypeLike, n_segments: int, after: Any = None
) -> Encoded:
    """Records as arrays."""
    segments = [ids for record in records for ids in record[:n_segments]]
    lengths = np.array([len(ids) for ids in segments], dtype=np.int64).reshape(-1, n_segments)
    tokens = np.fromiter(chain.from_iterable(segments), dtype, int(lengths.sum()))
    columns = np.array([record[n_segments:] for record in records], dtype=np.float32, ndmin=2)
    return Encoded(tokens, lengths, columns, after)


def in_batches(
    records: Iterable[Record], dtype: DTypeLike, n_segments: int, *, skipped: int
) -> Iterator[Encoded]:
    """Records in batches of bounded size, numbered on from those that were skipped."""
    batch: list[Record] = []
    held = 0
    for record in records:
        batch.append(record)
        held += sum(len(ids) for ids in record[:n_segments])
        if len(batch) == BATCH_RECORDS or held >= BATCH_TOKENS:
            skipped += len(batch)
            yield encoded(batch, dtype, n_segments, skipped)
            batch, held = [], 0
    if batch:
        yield encoded(batch, dtype, n_segments, skipped + len(batch))


class StoreWriter:
    """Appends records to the shards of a folder in bounded memory, hashing as it goes.

    Attributes:
        after: where the reading stood behind the last whole shard, ``None`` at the beginning.

    Args:
        folder: has whole shards already when an earlier writer was stopped.
        segments: names of a record's segments.
        columns: names of a record's numbers.
        dtype: of a token.
    """

    def __init__(
        self, folder: Path, segments: Sequence[str], columns: Sequence[str], dtype: np.dtype[Any]
    ) -> None:
        self.folder, self.segments, self.columns, self.dtype = folder, segments, columns, dtype
        self.rows = self.end = 0  # records and tokens so far
        self.after: Any = None
        self.shards: list[dict[str, Any]] = []
        self._whole = _Digests(columns)
        self._open: _OpenShard | None = None
        self._told, self._told_tokens = time.monotonic(), 0
        self._go_on()

    def write(self, batches: Iterable[Encoded]) -> None:
        """Append records; a shard that has enough of them is closed."""
        try:
            for batch in batches:
                if not len(batch.lengths):
                    continue  # all of its rows were dropped
                if self._open is None:
                    self._open = _OpenShard(self.folder, len(self.shards), self.columns)
                self._open.append(batch)
                self._count(batch.tokens, _bounds(batch.lengths, self.end), batch.columns.T)
                self.after = batch.after
                if self._open.end >= current().shard_tokens:
                    self._close()
            self._close()
        finally:
            if self._open is not None:
                self._open.discard()

    def finish(self, facts: Mapping[str, Any], *, dropped: Mapping[str, int], what: str) -> None:
        """Write the manifest.

        Args:
            facts: of the store, beside those that the writer knows.
            dropped: rows left out, by reason.
            what: the data, for the error.

        Raises:
            DataError: no record was written.
        """
        if not self.rows:
            reasons = ", ".join(f"{n} {why}" for why, n in sorted(dropped.items()))
            raise DataError(f"no row is left of {what}: {reasons or 'empty'}")
        # As if all were one shard, so that equal content is equal however it was cut.
        shape = [self.segments, self.columns, self.dtype.name]
        manifest = {
            **facts,
            "format": FORMAT,
            "segments": self.segments,
            "columns": self.columns,
            "dtype": self.dtype.name,
            "rows": self.rows,
            "tokens": self.end,
            "dropped": dropped,
            "fingerprint": sha256_json([*shape, self._whole.files()]),
            "shards": self.shards,
        }
        write_json(self.folder / MANIFEST, manifest, on_exists="skip")

    def _count(self, tokens: NDArray[Any], bounds: Ints, columns: NDArray[np.float32]) -> None:
        """Take records into the counts and the hash of the whole."""
        self._whole.update("tokens.bin", tokens)
        self._whole.update("offsets.bin", bounds)
        for name, values in zip(self.columns, columns, strict=True):
            self._whole.update(f"column-{name}.bin", values)
        self.end += len(tokens)
        self.rows += len(bounds)
        now = time.monotonic()
        if now - self._told >= LINE_SECONDS:
            speed = (self.end - self._told_tokens) / (now - self._told)
            log.info("%s tokens, %s a second", f"{self.end:,}", f"{speed:,.0f}")
            self._told, self._told_tokens = now, self.end

    def _close(self) -> None:
        """Publish the open shard; its record is written last."""
        if self._open is not None:
            shard = {**self._open.publish(), "after": self.after}
            write_json(_record_path(self.folder, len(self.shards)), shard, on_exists="skip")
            self.shards.append(_described(shard))
            self._open = None

    def _go_on(self) -> None:
        """Take over the whole shards of a writer that was stopped, and clear the rest away."""
        while (record := _record_of(self.folder, len(self.shards), self.columns)) is not None:
            number, (rows, tokens) = len(self.shards), (record["rows"], record["tokens"])
            ids = np.fromfile(self.folder / tokens_file(number), self.dtype)
            local = np.fromfile(self.folder / offsets_file(number), np.int64)
            columns = [
                np.fromfile(self.folder / column_file(number, c), np.float32) for c in self.columns
            ]
            bounds = local.reshape(rows, len(self.segments) + 1) + self.end
            assert len(ids) == tokens
            self._count(ids, bounds, np.array(columns, np.float32).reshape(-1, rows))
            self.after = record["after"]
            self.shards.append(_described(record))
        if self.shards:
            log.info("goes on behind %d whole shards, %s tokens", len(self.shards), f"{self.end:,}")
        kept = {_record_path(self.folder, i).name for i in range(len(self.shards))}
        kept |= {name for shard in self.shards for name in shard["files"]}
        for path in self.folder.iterdir():
            if path.name not in kept and path.name != ".lock":
                path.unlink()
        self._told_tokens = self.end


class _Digests:
    """Size and sha256 of files while they are written."""

    def __init__(self, columns: Sequence[str]) -> None:
        names = ("tokens.bin", "offsets.bin", *(f"column-{c}.bin" for c in columns))
        self._digests = {name: hashlib.sha256() for name in names}
        self._sizes = dict.fromkeys(names, 0)

    def update(self, name: str, values: NDArray[Any]) -> None:
        data = np.ascontiguousarray(values).data.cast("B") if values.size else b""
        self._digests[name].update(data)
        self._sizes[name] += len(data)

    def files(self) -> dict[str, dict[str, Any]]:
        return {
            name: {"bytes": self._sizes[name], "sha256": digest.hexdigest()}
            for name, digest in self._digests.items()
        }


class _OpenShard:
    """The files of one shard while it grows, under names that no other process has."""

    def __init__(self, folder: Path, number: int, columns: Sequence[str]) -> None:
        self.folder, self.columns = folder, columns
        self.rows = self.end = 0
        self.names = shard_files(number, columns)
        self._digests = {name: hashlib.sha256() for name in self.names}
        self._files: dict[str, IO[bytes]] = {n: self._part(n).open("wb") for n in self.names}

    def append(self, batch: Encoded) -> None:
        arrays = (batch.tokens, _bounds(batch.lengths, self.end), *batch.columns.T)
        for name, values in zip(self.names, arrays, strict=True):
            data = np.ascontiguousarray(values).data.cast("B") if values.size else b""
            self._files[name].write(data)
            self._digests[name].update(data)
        self.end += len(batch.tokens)
        self.rows += len(batch.lengths)

    def publish(self) -> dict[str, Any]:
        files = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(self._part(name), self.folder / name)
            state = (self.folder / name).stat()
            files[name] = {
                "bytes": state.st_size,
                "sha256": self._digests[name].hexdigest(),
                "mtime_ns": state.st_mtime_ns,
            }
        fsync_folder(self.folder)
        return {"rows": self.rows, "tokens": self.end, "files": files}

    def discard(self) -> None:
        for name, file in self._files.items():
            file.close()
            self._part(name).unlink(missing_ok=True)

    def _part(self, name: str) -> Path:
        return self.folder / f".part-{os.getpid()}-{name}"


def _bounds(lengths: Ints, first: int) -> Ints:
    """Where the segments of records begin and the last ends, from token ``first`` on."""
    n, k = lengths.shape
    ends = first + np.cumsum(lengths.reshape(-1)).reshape(n, k)
    return np.concatenate([ends[:, :1] - lengths[:, :1], ends], axis=1)


def _described(shard: Mapping[str, Any]) -> dict[str, Any]:
    return {key: shard[key] for key in ("rows", "tokens", "files")}


def _record_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.json"


def _record_of(folder: Path, number: int, columns: Sequence[str]) -> dict[str, Any] | None:
    """What is told of a shard; ``None`` when it is not there, or not whole."""
    try:
        record: dict[str, Any] = json.loads(_record_path(folder, number).read_text())
        for name in shard_files(number, columns):
            if sha256_file(folder / name) != record["files"][name]["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record


def clear_records(folder: Path, n_shards: int) -> None:
    """Remove what only a writer that goes on needs."""
    for number in range(n_shards):
        _record_path(folder, number).unlink(missing_ok=True)
    (folder / ".lock").unlink(missing_ok=True)
