"""Token records in memory-mapped files, built once and keyed by all that decides their content.

A record has k segments (prompt, chosen, rejected). All tokens lie in one flat array; ``offsets``
says where each segment begins and ends. A store is published whole by one rename: a killed build
leaves nothing visible, and of two processes that build the same one the second uses the first's.
"""

import hashlib
import itertools
import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from modern_llm.data.sources.base import RowCounts
from modern_llm.errors import DataError, ProtectedPathError
from modern_llm.runtime.artifacts import published_folder, sha256_file, sha256_json, write_json
from modern_llm.runtime.logs import get_logger

FORMAT = 1
FLUSH_RECORDS, FLUSH_TOKENS = 1024, 1 << 18  # written at once while building
RELEASE_READS = 1024  # records read between two releases of mapped memory
TOKENS, OFFSETS, MANIFEST = "tokens.bin", "offsets.bin", "manifest.json"

log = get_logger(__name__)
Record = tuple[Any, ...]  # one sequence of ids a segment, then one number a column


class TokenStore:
    """A finished store, memory-mapped: opening it reads its manifest only.

    Attributes:
        segments: names of the k segments.
        tokens: flat ids, uint16 or uint32.
        offsets: int64 ``(n, k + 1)``; segment j of record i is
            ``tokens[offsets[i, j]:offsets[i, j + 1]]``, and record i + 1 follows record i.
        columns: float32 numbers, one a record.
        pad_id: id that batches are padded with.
        fingerprint: sha256 over content and shape.
        counts: rows kept and dropped, by reason, when the store was built.
        sources: one summary a source: source, split, kind, rows, tokens, dropped, fingerprint.

    Raises:
        DataError: not a store, or a file has another size than the manifest says, or was changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reads = 0
        manifest = _read_manifest(folder)
        self.segments: tuple[str, ...] = tuple(manifest["segments"])
        self.pad_id: int = manifest["pad_id"]
        self.fingerprint: str = manifest["fingerprint"]
        self.counts = RowCounts(manifest["rows"], dict(manifest["dropped"]))
        self.sources: list[dict[str, Any]] = manifest["sources"]
        shape = (manifest["rows"], len(self.segments) + 1)
        self.tokens: NDArray[Any] = np.memmap(folder / TOKENS, manifest["dtype"], mode="r")
        self.offsets: NDArray[np.int64] = np.memmap(folder / OFFSETS, np.int64, "r", shape=shape)
        self.columns: dict[str, NDArray[np.float32]] = {
            name: np.memmap(folder / _column_file(name), np.float32, "r")
            for name in manifest["columns"]
        }

    def __len__(self) -> int:
        return self.counts.kept

    @property
    def n_tokens(self) -> int:
        """All tokens of all records."""
        return len(self.tokens)

    def record(self, i: int) -> tuple[NDArray[Any], ...]:
        """The segments of record ``i``."""
        ends = self.offsets[i]
        return tuple(self.tokens[a:b] for a, b in itertools.pairwise(ends))

    def note_reads(self, n: int) -> None:
        """Count ``n`` scattered reads; now and then give the mapped pages back.

        Pages of a mapped file count as this process's memory once they were touched. They stay in
        the system's cache, so reading them again is cheap.
        """
        self._reads += n
        if self._reads >= RELEASE_READS:
            self._reads = 0
            for array in (self.tokens, self.offsets):
                mapped: mmap.mmap = array._mmap  # type: ignore[union-attr]
                mapped.madvise(mmap.MADV_DONTNEED)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each segment, ``(n, k)``."""
        return np.diff(self.offsets, axis=1)


def build_store(
    cache_dir: Path,
    *,
    segments: Sequence[str],
    key: Mapping[str, Any],
    records: Iterator[Record],
    n_vocab: int,
    pad_id: int,
    columns: Sequence[str] = (),
    counts: RowCounts | None = None,
    sources: Sequence[Mapping[str, Any]] = (),
) -> TokenStore:
    """The store of ``key``: the one that stands, or a new one from ``records``.

    Args:
        cache_dir: stores lie below ``stores/``, named by the hash of the key.
        segments: names of a record's segments.
        key: everything that decides the content: sources, tokenizer, template, options.
        records: read once, only when the store has to be built; a record is one sequence of ids a
            segment, followed by one number a column.
        n_vocab: ids are below it; up to 65536 they take two bytes, else four.
        pad_id: recorded for batches.
        columns: names of numbers that each record carries.
        counts: filled while ``records`` is read; its reasons for dropping go into the manifest.
        sources: summaries for reports, also filled by then.

    Raises:
        DataError: no record is left, or ``records`` raises it.
    """
    shape = {"segments": list(segments), "columns": list(columns), "n_vocab": n_vocab}
    name = sha256_json({"format": FORMAT, "pad_id": pad_id, **shape, **key})[:32]
    folder = cache_dir / "stores" / name
    if folder.exists():
        try:
            return TokenStore(folder)
        except DataError as error:
            aside = folder.with_name(f"damaged-{name}-{os.getpid()}")
            log.warning("%s; moved to %s and built again", error, aside.name)
            folder.rename(aside)
    try:
        with published_folder(folder) as staging:
            writer = _Writer(staging, tuple(segments), tuple(columns), n_vocab)
            writer.write(records)
            counts = counts or RowCounts()
            writer.finish(pad_id=pad_id, dropped=counts.dropped, key=key, sources=sources)
    except ProtectedPathError:
        if not folder.exists():
            raise
        # Another process was faster; both were given the same key, so its content is ours.
    return TokenStore(folder)


class _Writer:
    """Appends records to the files of a staging folder in bounded memory, hashing as it goes."""

    def __init__(
        self, folder: Path, segments: tuple[str, ...], columns: tuple[str, ...], n_vocab: int
    ) -> None:
        self.folder, self.segments, self.columns = folder, segments, columns
        self.dtype = np.dtype(np.uint16 if n_vocab <= 1 << 16 else np.uint32)
        self.rows = 0
        self.end = 0  # tokens so far
        self.names = [TOKENS, OFFSETS, *(_column_file(c) for c in columns)]
        self.digests = {name: hashlib.sha256() for name in self.names}
        self.sizes = dict.fromkeys(self.names, 0)

    def write(self, records: Iterator[Record]) -> None:
        files = {name: (self.folder / name).open("wb") for name in self.names}
        try:
            chunk: list[Record] = []
            held = 0
            for record in records:
                chunk.append(record)
                held += sum(len(ids) for ids in record[: len(self.segments)])
                if len(chunk) == FLUSH_RECORDS or held >= FLUSH_TOKENS:
                    self._flush(chunk, files)
                    chunk, held = [], 0
            self._flush(chunk, files)
        finally:
            for file in files.values():
                file.close()

    def _flush(self, chunk: list[Record], files: Mapping[str, IO[bytes]]) -> None:
        if not chunk:
            return
        k = len(self.segments)
        parts = [np.asarray(ids, dtype=self.dtype) for record in chunk for ids in record[:k]]
        lengths = np.array([len(part) for part in parts], dtype=np.int64).reshape(-1, k)
        starts = self.end + np.cumsum(lengths.reshape(-1)) - lengths.reshape(-1)
        bounds = np.concatenate([starts.reshape(-1, k), lengths.sum(1, keepdims=True)], axis=1)
        bounds[:, k] += bounds[:, 0]
        self._append(files, TOKENS, np.concatenate(parts))
        self._append(files, OFFSETS, bounds)
        for c, column in enumerate(self.columns):
            values = np.array([record[k + c] for record in chunk], dtype=np.float32)
            self._append(files, _column_file(column), values)
        self.end += int(lengths.sum())
        self.rows += len(chunk)

    def _append(self, files: Mapping[str, IO[bytes]], name: str, values: NDArray[Any]) -> None:
        data = np.ascontiguousarray(values).tobytes()
        files[name].write(data)
        self.digests[name].update(data)
        self.sizes[name] += len(data)

    def finish(
        self,
        *,
        pad_id: int,
        dropped: Mapping[str, int],
        key: Mapping[str, Any],
        sources: Sequence[Mapping[str, Any]],
    ) -> None:
        if not self.rows:
            reasons = ", ".join(f"{n} {why}" for why, n in sorted(dropped.items()))
            raise DataError(
                f"no row is left of {key.get('what', 'the data')}: {reasons or 'empty'}"
            )
        files: dict[str, dict[str, Any]] = {
            name: {"bytes": self.sizes[name], "sha256": self.digests[name].hexdigest()}
            for name in self.names
        }
        manifest = {
            "format": FORMAT,
            "segments": self.segments,
            "columns": self.columns,
            "dtype": self.dtype.name,
            "rows": self.rows,
            "tokens": self.end,
            "pad_id": pad_id,
            "dropped": dropped,
            "fingerprint": sha256_json([self.segments, self.columns, self.dtype.name, files]),
            "key": key,
            "sources": sources,
            "files": files,
        }
        for name, file in files.items():  # after the fingerprint, which is of content only
            file["mtime_ns"] = (self.folder / name).stat().st_mtime_ns
        write_json(self.folder / MANIFEST, manifest)


def _column_file(name: str) -> str:
    return f"column-{name}.bin"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise DataError(f"{path}: format {manifest['format']}, this version reads {FORMAT}")
        for name, file in manifest["files"].items():
            state = (folder / name).stat()
            if state.st_size != file["bytes"]:
                raise DataError(
                    f"{folder / name}: {state.st_size} bytes, the manifest says {file['bytes']}"
                )
            touched = state.st_mtime_ns != file["mtime_ns"]  # hashed only then: it may be large
            if touched and sha256_file(folder / name) != file["sha256"]:
                raise DataError(f"{folder / name}: its content is not what was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a whole token store: {error!r}") from None
    return manifest
