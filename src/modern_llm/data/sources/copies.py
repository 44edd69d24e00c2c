"""Copies of hub sets under the cache folder, for machines that have no network.

A copy is one file of rows as the hub gave them, with its size and sha256 beside it. It appears
whole or not at all, is named by the set's commit, and is read in place of the hub.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modern_llm.data.making import current
from modern_llm.data.sources.hub import HubSet
from modern_llm.errors import DataError, ProtectedPathError
from modern_llm.runtime.artifacts import (
    back_up,
    published_folder,
    sha256_file,
    sha256_json,
    write_json,
)
from modern_llm.runtime.logs import counted, get_logger

FORMAT = 1
ROWS, MANIFEST = "rows.jsonl", "manifest.json"
WAY_OUT = "run 'modern-llm prepare-data' where there is a network, or copy it again"

log = get_logger(__name__)


def copy_folder(hub: HubSet, split: str, cache_dir: Path) -> Path:
    """Where the copy of a split of ours is, or would be."""
    name = sha256_json([FORMAT, hub.address, hub.splits[split]])[:32]
    return cache_dir / "hub" / name


def copy_set(hub: HubSet, split: str, wanted: str, cache_dir: Path) -> None:
    """Copy a split from the hub, unless there is a copy, as `making` says.

    Args:
        hub: the set.
        split: one of ours that the set has.
        wanted: see `HubSet.rows`.
        cache_dir: where copies are.

    Raises:
        DataError: the hub does not give it, or the copy that stands is damaged or not to be made.
        ProtectedPathError: the folder cannot be written.
    """
    folder = copy_folder(hub, split, cache_dir)
    if folder.exists():
        try:
            check_copy(folder, verify=True)
            return
        except DataError as error:
            if not current().repair:
                raise
            log.warning("%s; moved to %s, and fetched again", error, back_up(folder).name)
    if not current().build:
        raise DataError(f"{hub.address}, {split} split: not copied ({folder} is not there)")
    try:
        with published_folder(folder) as staging:
            _write(staging, hub, split, wanted)
    except ProtectedPathError:
        if not folder.exists():  # else another process was faster, with the same rows
            raise


def _write(folder: Path, hub: HubSet, split: str, wanted: str) -> None:
    digest, size, number = hashlib.sha256(), 0, 0
    with (folder / ROWS).open("wb") as file:
        for _, row in counted(hub.rows(split, wanted), f"{hub.address} {split}, rows"):
            line = json.dumps(row).encode() + b"\n"
            file.write(line)
            digest.update(line)
            size += len(line)
            number += 1
    what = {"address": hub.address, "split": split, "rows": number}
    write_json(folder / MANIFEST, {**what, "bytes": size, "sha256": digest.hexdigest()})


def check_copy(folder: Path, *, verify: bool = False) -> None:
    """Refuse a copy that is not whole.

    Args:
        folder: see `copy_folder`.
        verify: hash it; else its size has to do.

    Raises:
        DataError: names the file.
    """
    path = folder / ROWS
    try:
        told = json.loads((folder / MANIFEST).read_text())
        size, wanted, sha256 = path.stat().st_size, told["bytes"], told["sha256"]
        changed = verify and size == wanted and sha256_file(path) != sha256
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a whole copy of a hub set: {error!r}; {WAY_OUT}") from None
    if size != wanted:
        raise DataError(f"{path}: {size} bytes, the manifest says {wanted}; {WAY_OUT}")
    if changed:
        raise DataError(f"{path}: its content is not what was written; {WAY_OUT}")


def copied_rows(hub: HubSet, split: str, cache_dir: Path) -> Iterator[tuple[str, Any]] | None:
    """Raw rows of the copy with where each is from, as `HubSet.rows`; ``None`` without a copy.

    Raises:
        DataError: the copy is damaged.
    """
    folder = copy_folder(hub, split, cache_dir)
    if not folder.exists():
        return None
    check_copy(folder)
    return _read(folder / ROWS, hub.address, split)


def _read(path: Path, address: str, split: str) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                raise DataError(f"{path}:{number}: not what was written; {WAY_OUT}") from None
            yield f"{address} {split} row {number}", row
