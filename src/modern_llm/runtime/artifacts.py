"""The only writer of result files: atomic, protected, one policy for what exists already.

Policies: ``timestamp`` (default) writes a sibling with the time in its name, ``skip`` leaves what
exists and writes nothing, ``replace`` moves what exists to a backup first. A file appears whole or
not at all, and two processes that race for one name end with two files.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from modern_llm.errors import DataError, ProtectedPathError
from modern_llm.runtime.files import FULL, cannot_write, io_told, lock_file
from modern_llm.runtime.names import backup_name, sibling_names, staging_name

Policy = Literal["timestamp", "skip", "replace"]
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


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
            _keep(path)
        os.replace(temporary, path)
        os.fsync(folder)
    finally:
        os.close(folder)


def _keep(path: Path) -> None:
    """Give the content of ``path`` a backup name too."""
    try:
        os.link(path, backup_name(path))
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copy2(path, backup_name(path))


def _claim(temporary: Path, name: Path) -> None:
    """Give ``temporary`` a name that nobody has.

    Raises:
        FileExistsError: somebody has it.
    """
    try:
        os.link(temporary, name)  # exclusive and atomic
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        name.open("x").close()  # exclusive; killed here, an empty file has the name
        os.replace(temporary, name)


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
    with io_told(path):
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
                    _claim(temporary, name)
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


def write_status(path: Path, value: Any) -> None:
    """Put JSON in the place of what ``path`` held: no result, but how a command ended."""
    with io_told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = staging_name(path)
        temporary.write_text(to_json(value))
        os.replace(temporary, path)


def new_folder(path: Path, *, on_exists: Policy = "timestamp") -> Path | None:
    """Make a folder that nobody else has, under the same policies as a file.

    Other users who are not of the group may not look into it.

    Returns:
        The folder made, or ``None`` when one exists and the policy is ``skip``.

    Raises:
        ProtectedPathError: the parent cannot be written.
    """
    with io_told(path):
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
def published_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a staging sibling that becomes ``target`` in one rename when the block succeeds.

    A killed process leaves ``.tmp-*``, never half a folder. Files are synced to disk before the
    rename and the parent after it.

    Args:
        target: name of the folder.
        replace: what stands there moves to a backup name just before the rename, so that a block
            that fails leaves it where it is.

    Raises:
        ProtectedPathError: ``target`` exists and is not to be replaced, the disk refuses, or the
            block cannot read or write a file; the staging folder is removed.
    """
    if target.exists() and not replace:
        raise ProtectedPathError(f"{target} exists; it is never overwritten in place")
    staging = staging_name(target)
    try:
        with io_told(target):
            staging.mkdir(parents=True)
        with block_told(target):
            yield staging
        with io_told(target):
            for file in staging.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            _publish(staging, target, replace=replace)
            fsync_folder(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def block_told(target: Path) -> Iterator[None]:
    """Tell an ``OSError`` of a block that fills ``target``: it may be of a file that is read."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise cannot_write(target, error) from error
        raise ProtectedPathError(f"{target} is not written: {error}") from error


def _publish(staging: Path, target: Path, *, replace: bool) -> None:
    """Rename ``staging`` to ``target``; what stood there is kept, and back if that fails."""
    old = back_up(target) if replace and target.exists() else None
    try:
        os.rename(staging, target)
    except OSError:
        if old is not None:
            with suppress(OSError):  # another process was faster
                os.rename(old, target)
        raise


class JsonLines:
    """An append-only log, one JSON object a line, one write a row.

    A torn last line (the process was killed inside a write) is cut off on opening. A row whose
    ``step`` is not above the last one of its ``kind`` is dropped: after a restart the same steps
    are computed again, to the bit, and are in the file already.

    Args:
        path: of the file.
        writes: ``False`` reads what is there, and only remembers what is appended: for the ranks
            that do what rank 0 does, which writes.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._last_step: dict[str, int] = {}
        if path.exists():
            self._repair()

    def _repair(self) -> None:
        whole = 0
        with io_told(self.path), self.path.open("r+b" if self.writes else "rb") as file:
            if self.writes:
                lock_file(file, self.path)  # nobody appends between reading and cutting
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    if self.writes:
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

    def has(self, kind: str, step: int) -> bool:
        """Whether a row of this kind and step, or of a later one, is there."""
        return step <= self._last_step.get(kind, -1)

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far, in order."""
        with io_told(self.path):
            lines = self.path.read_bytes().splitlines()
        return [self._parsed(line, number) for number, line in enumerate(lines, start=1)]

    def append(self, row: dict[str, Any]) -> bool:
        """Append one row; returns whether it was written (see the class docstring)."""
        kind, step = str(row.get("kind")), row.get("step")
        if step is not None and self.has(kind, step):
            return False
        self._remember(row)
        if not self.writes:
            return False
        line = json.dumps(_finite(row), allow_nan=False) + "\n"
        with io_told(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                lock_file(file, self.path)
                file.write(line.encode())
        return True
