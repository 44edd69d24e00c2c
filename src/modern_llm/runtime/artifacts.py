"""The only writer of result files: atomic, protected, one policy for what exists already.

Policies: ``timestamp`` (default) writes a sibling with the time in its name, ``skip`` leaves what
exists and writes nothing, ``replace`` moves what exists to a backup first. A file appears whole or
not at all, and two processes that race for one name end with two files.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from modern_llm.errors import ConfigError, DataError, ProtectedPathError

Policy = Literal["timestamp", "skip", "replace"]


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: Any) -> str:
    """Canonical JSON: sorted keys, two spaces, non-finite numbers as null."""
    return json.dumps(_finite(value), indent=2, sort_keys=True, allow_nan=False) + "\n"


def sha256_json(value: Any) -> str:
    """Hex sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(to_json(value).encode()).hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    return value


def sibling_names(path: Path, *, suffix: str = "") -> Iterator[Path]:
    """``path``, then siblings with the UTC time (and a counter) before ``suffix``, for ever.

    A folder has no suffix, whatever dots are in its name.
    """
    yield path
    stem, stamp = path.name.removesuffix(suffix), datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    yield path.with_name(f"{stem}_{stamp}{suffix}")
    count = 2
    while True:
        yield path.with_name(f"{stem}_{stamp}-{count}{suffix}")
        count += 1


def standing_siblings(path: Path, *, suffix: str = "") -> list[Path]:
    """Those names of `sibling_names`, of any time, that exist; the newest first."""
    stem = re.escape(path.name.removesuffix(suffix))
    form = re.compile(rf"{stem}(_\d{{8}}-\d{{6}}(-\d+)?)?{re.escape(suffix)}")
    found = [name for name in path.parent.glob("*") if form.fullmatch(name.name)]
    return sorted(found, key=lambda name: name.stat().st_mtime, reverse=True)


def staging_name(path: Path) -> Path:
    """Hidden sibling that becomes ``path``; processes of two machines never share one."""
    return path.with_name(f".tmp-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def backup_name(path: Path) -> Path:
    """``<name>.bak-<time>`` beside ``path``, to the microsecond."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    return path.with_name(f"{path.name}.bak-{stamp}")


def back_up(path: Path) -> Path:
    """Move ``path`` to its backup name and return that."""
    target = backup_name(path)
    os.rename(path, target)
    return target


def _replace(temporary: Path, path: Path) -> None:
    """Put ``temporary`` in the place of ``path``, whose old content stays under a backup name.

    The name holds the old or the new content at every moment; of two processes that replace one
    file at once, each finds the other's content or the old one, and keeps it.
    """
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(folder, fcntl.LOCK_EX)
        if path.exists():
            os.link(path, backup_name(path))
        os.replace(temporary, path)
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _io_told(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` into one message that names the path."""
    try:
        yield
    except OSError as error:
        raise ProtectedPathError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another output"
        ) from error


def fsync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes, *, on_exists: Policy = "timestamp") -> Path | None:
    """Write a result file whole or not at all.

    Args:
        path: wanted name; its parent folders are made.
        data: the whole content.
        on_exists: policy, see the module's docstring.

    Returns:
        The path really written, or ``None`` when it was skipped.

    Raises:
        ProtectedPathError: the folder is read-only or full; nothing is left behind.
    """
    if on_exists == "skip" and path.exists():
        return None
    with _io_told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = staging_name(path)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if on_exists == "replace":
                _replace(temporary, path)
                return path
            for name in sibling_names(path, suffix=path.suffix):
                try:
                    os.link(temporary, name)  # fails when the name exists: exclusive, atomic
                except FileExistsError:
                    if on_exists == "skip":
                        return None
                    continue
                fsync_folder(path.parent)
                return name
        finally:
            temporary.unlink(missing_ok=True)
    return None


def write_text(path: Path, text: str, *, on_exists: Policy = "timestamp") -> Path | None:
    """Write text as UTF-8; see `write_bytes`."""
    return write_bytes(path, text.encode(), on_exists=on_exists)


def write_json(path: Path, value: Any, *, on_exists: Policy = "timestamp") -> Path | None:
    """Write canonical JSON; see `to_json` and `write_bytes`."""
    return write_text(path, to_json(value), on_exists=on_exists)


def new_folder(path: Path, *, on_exists: Policy = "timestamp") -> Path | None:
    """Make a folder that nobody else has, under the same policies as a file.

    Other users who are not of the group may not look into it.

    Returns:
        The folder made, or ``None`` when one exists and the policy is ``skip``.

    Raises:
        ProtectedPathError: the parent cannot be written.
    """
    with _io_told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if on_exists == "replace":
            with suppress(FileNotFoundError):  # nothing there, or another process was faster
                back_up(path)
        for name in sibling_names(path):
            try:
                name.mkdir(mode=0o750)
                return name
            except FileExistsError:
                if on_exists == "skip":
                    return None
    return None


@contextmanager
def published_folder(target: Path) -> Iterator[Path]:
    """Yield a staging sibling that becomes ``target`` in one rename when the block succeeds.

    A killed process leaves ``.tmp-*``, never half a folder. Files are synced to disk before the
    rename and the parent after it.

    Raises:
        ProtectedPathError: ``target`` exists, or the disk refuses; the staging folder is removed.
    """
    if target.exists():
        raise ProtectedPathError(f"{target} exists; it is never overwritten in place")
    staging = staging_name(target)
    with _io_told(target):
        try:
            staging.mkdir(parents=True)
            yield staging
            for file in staging.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            os.rename(staging, target)
            fsync_folder(target.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; the lock dies with the process, so none is ever stale.

    Raises:
        ConfigError: another process holds it; names its pid and host.
        ProtectedPathError: the folder cannot be written.
    """
    with _io_told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("a+")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            raise ConfigError(
                f"{folder} is in use by another run ({holder}); wait, or give another --run-name"
            ) from None
        handle.truncate(0)
        handle.write(f"pid {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield


class JsonLines:
    """An append-only log, one JSON object a line, one write a row.

    A torn last line (the process was killed inside a write) is cut off on opening. A row whose
    ``step`` is not above the last one of its ``kind`` is dropped: after a restart the same steps
    are computed again, to the bit, and are in the file already.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last_step: dict[str, int] = {}
        if path.exists():
            self._repair()

    def _repair(self) -> None:
        whole = 0
        with _io_told(self.path), self.path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # nobody appends between reading and cutting
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    file.truncate(whole)
                    break
                whole += len(line)
                self._remember(self._parsed(line, number))

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{self.path}:{number}: not a JSON object; the log was altered")
        return row

    def _remember(self, row: dict[str, Any]) -> None:
        if row.get("kind") in ("train", "eval", "sample") and "step" in row:
            self._last_step[row["kind"]] = int(row["step"])

    def append(self, row: dict[str, Any]) -> bool:
        """Append one row; returns whether it was written (see the class docstring)."""
        kind, step = str(row.get("kind")), row.get("step")
        if step is not None and step <= self._last_step.get(kind, -1):
            return False
        line = json.dumps(_finite(row), allow_nan=False) + "\n"
        with _io_told(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(line.encode())
        self._remember(row)
        return True
