"""Token stores: records in memory-mapped shards, built once and keyed by all that decides them.

A record has k segments (prompt, chosen, rejected). A store is published whole by one rename: a
killed build leaves nothing visible, and goes on behind its whole shards when it is started again;
of two processes that build the same one the second waits and uses the first's.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modern_llm.data.lookup import remembered_hash
from modern_llm.data.making import current
from modern_llm.data.shards import Ints, Shards, Tokens
from modern_llm.data.sources.base import RowCounts
from modern_llm.data.writer import (
    FORMAT,
    MANIFEST,
    Encoded,
    Record,
    StoreWriter,
    clear_records,
    in_batches,
)
from modern_llm.errors import DataError
from modern_llm.runtime.artifacts import block_told, fsync_folder, sha256_file, sha256_json, to_json
from modern_llm.runtime.files import locked
from modern_llm.runtime.logs import get_logger

MAKE_AGAIN = "run 'modern-llm prepare-data' with this config, which makes it anew"

log = get_logger(__name__)
Batches = Callable[[Any], Iterable[Encoded]]  # records behind a state that an `Encoded` told


class TokenStore:
    """A finished store: opening it reads its manifest, and sizes and times of its files.

    Args:
        folder: of the store.
        hashes: folder where the hash of a file whose time changed is remembered; without it such
            a file is hashed at each opening.
        verify: hash all files.

    Attributes:
        segments: names of the k segments.
        shards: its files.
        tokens: all ids in a row, uint16 or uint32.
        pad_id: id that batches are padded with.
        fingerprint: sha256 over content and shape, however the content is cut into shards.
        counts: rows kept and dropped, by reason, when the store was built.
        sources: one summary a source: source, split, kind, rows, tokens, dropped, fingerprint.

    Raises:
        DataError: not a store, or a file has another size than the manifest says, or was changed.
    """

    def __init__(self, folder: Path, *, hashes: Path | None = None, verify: bool = False) -> None:
        self.folder = folder
        self.manifest = manifest = _read_manifest(folder)
        try:
            self.segments: tuple[str, ...] = tuple(manifest["segments"])
            self.column_names: tuple[str, ...] = tuple(manifest["columns"])
            self.pad_id: int = manifest["pad_id"]
            self.fingerprint: str = manifest["fingerprint"]
            self.counts = RowCounts(manifest["rows"], dict(manifest["dropped"]))
            self.sources: list[dict[str, Any]] = manifest["sources"]
            self.n_tokens: int = manifest["tokens"]  # of all records
            _check_files(folder, manifest["shards"], hashes, verify=verify)
            dtype = np.dtype(manifest["dtype"])
            self.shards = Shards(folder, manifest["shards"], dtype, len(self.segments))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / MANIFEST}: not a token store's: {error!r}") from None
        self.tokens = Tokens(self.shards)

    def __len__(self) -> int:
        return self.counts.kept

    def record(self, i: int) -> tuple[NDArray[Any], ...]:
        """The segments of record ``i``."""
        (ends,) = self.shards.bounds(np.array([i])).tolist()
        return tuple(self.shards.span(a, b) for a, b in pairwise(ends))

    def bounds(self, rows: Ints) -> Ints:
        """Where the segments of records begin and the last ends, ``(n, k + 1)``."""
        return self.shards.bounds(rows)

    def lengths(self) -> Ints:
        """Tokens of each segment, ``(n, k)``: of all records, in memory."""
        offsets = (self.shards.offsets(shard) for shard in range(len(self.shards)))
        return np.concatenate([np.diff(of_shard, axis=1) for of_shard in offsets])

    @cached_property
    def columns(self) -> dict[str, NDArray[np.float32]]:
        """Numbers that each record carries, in memory."""
        every = range(len(self.shards))
        return {
            name: np.concatenate([self.shards.column(shard, name) for shard in every])
            for name in self.column_names
        }


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
) -> TokenStore:
    """The store of ``key``: the one that stands, or a new one from ``records``.

    Args:
        cache_dir: see `build_from_batches`, as for the others.
        segments: names of a record's segments.
        key: everything that decides the content.
        records: read once, only when the store has to be built; a record is one sequence of ids a
            segment, followed by one number a column.
        n_vocab: ids are below it.
        pad_id: recorded for batches.
        columns: names of numbers that each record carries.
        counts: filled while ``records`` is read.

    Raises:
        DataError: as `build_from_batches`.
    """

    def batches(after: int | None) -> Iterator[Encoded]:
        skipped = after or 0
        rest = islice(records, skipped, None)
        return in_batches(rest, token_dtype(n_vocab), len(segments), skipped=skipped)

    return build_from_batches(
        cache_dir, segments=segments, key=key, batches=batches, n_vocab=n_vocab, pad_id=pad_id,
        columns=columns, counts=counts,
    )  # fmt: skip


def build_from_batches(
    cache_dir: Path,
    *,
    segments: Sequence[str],
    key: Mapping[str, Any],
    batches: Batches,
    n_vocab: int,
    pad_id: int,
    columns: Sequence[str] = (),
    counts: RowCounts | None = None,
    sources: Sequence[Mapping[str, Any]] = (),
) -> TokenStore:
    """The store of ``key``: the one that stands, or a new one, as `making` says.

    Args:
        cache_dir: stores lie below ``stores/``, named by the hash of the key.
        segments: names of a record's segments.
        key: everything that decides the content: sources, tokenizer, template, options.
        batches: gives the records behind the state of the last whole shard, ``None`` for all of
            them; called only when the store has to be built.
        n_vocab: ids are below it; up to 65536 they take two bytes, else four.
        pad_id: recorded for batches.
        columns: names of numbers that each record carries.
        counts: filled while records are read; its reasons for dropping go into the manifest.
        sources: summaries for reports, also filled by then.

    Raises:
        DataError: no record is left, reading them raises it, or the store that stands is damaged
            or of other data.
    """
    shape = {"segments": list(segments), "columns": list(columns), "n_vocab": n_vocab}
    full = {"pad_id": pad_id, **shape, **key}
    folder = cache_dir / "stores" / sha256_json({"format": FORMAT, **full})[:32]
    what = str(key.get("what", "the data"))
    if (store := _standing(folder, full, cache_dir)) is not None:
        return store
    if not current().build:
        raise DataError(f"{what}: not prepared ({folder} is not there)")
    partial = folder.with_name(f".tmp-{folder.name}")
    with locked(partial, wait=True), block_told(folder):
        if folder.exists():  # another process was faster; the same key gives the same content
            shutil.rmtree(partial, ignore_errors=True)
            return _opened(folder, full, cache_dir)
        counts = counts or RowCounts()
        writer = None
        try:
            writer = StoreWriter(partial, segments, columns, token_dtype(n_vocab))
            writer.write(batches(writer.after))
            facts = {"key": full, "pad_id": pad_id, "sources": sources}
            writer.finish(facts, dropped=counts.dropped, what=what)
        except BaseException:
            if not (writer and writer.shards):  # else those are gone on with
                shutil.rmtree(partial, ignore_errors=True)
            raise
        os.rename(partial, folder)
        clear_records(folder, len(writer.shards))
        fsync_folder(folder.parent)
    return _opened(folder, full, cache_dir)


def token_dtype(n_vocab: int) -> np.dtype[Any]:
    """The smallest type of ids below ``n_vocab``."""
    return np.dtype(np.uint16 if n_vocab <= 1 << 16 else np.uint32)


def _standing(folder: Path, key: Mapping[str, Any], cache_dir: Path) -> TokenStore | None:
    """The store that stands, if there is one; a damaged one is set aside where that is asked."""
    if not folder.exists():
        return None
    try:
        return _opened(folder, key, cache_dir)
    except DataError as error:
        if not current().repair:
            raise DataError(f"{error}; {MAKE_AGAIN}") from None
        aside = folder.with_name(f"damaged-{folder.name}-{os.getpid()}")
        log.warning("%s; moved to %s and built again", error, aside.name)
        folder.rename(aside)
        return None


def _opened(folder: Path, key: Mapping[str, Any], cache_dir: Path) -> TokenStore:
    """The store of a folder, if it is that of ``key``."""
    store = TokenStore(folder, hashes=cache_dir / "hashes", verify=current().verify)
    wanted, found = json.loads(to_json(key)), store.manifest.get("key")
    if found != wanted:
        ours, theirs = (str((k or {}).get("tokenizer"))[:12] for k in (wanted, found))
        why = f"tokenizer {theirs}, not {ours}" if ours != theirs else "other data or options"
        raise DataError(f"{folder / MANIFEST}: it was made with {why}")
    return store


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        found = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a whole token store: {error!r}") from None
    if found != FORMAT:
        raise DataError(f"{path}: format {found}, this version reads {FORMAT}")
    return dict(manifest)


def _check_files(
    folder: Path, shards: Sequence[Mapping[str, Any]], hashes: Path | None, *, verify: bool
) -> None:
    """Refuse files that are missing, of another size, or of another content.

    A file is hashed when its time is not the one that was written, which costs a copy that does
    not keep times one reading of all, or when all are to be.
    """
    doubtful: list[tuple[Path, str]] = []
    for name, file in ((n, f) for shard in shards for n, f in shard["files"].items()):
        path = folder / name
        try:
            state = path.stat()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; the store was copied in part") from None
        if state.st_size != file["bytes"]:
            raise DataError(f"{path}: {state.st_size} bytes, the manifest says {file['bytes']}")
        if verify or state.st_mtime_ns != file["mtime_ns"]:
            doubtful.append((path, file["sha256"]))
    if len(doubtful) > 1 and not verify:
        log.info("%s: %d files have another time; checking them", folder, len(doubtful))

    def digest(path: Path) -> str:
        return remembered_hash(path, hashes) if hashes and not verify else sha256_file(path)

    with ThreadPoolExecutor() as pool:
        for (path, wanted), found in zip(
            doubtful, pool.map(digest, (path for path, _ in doubtful)), strict=True
        ):
            if found != wanted:
                raise DataError(f"{path}: its content is not what was written")
