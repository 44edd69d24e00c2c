"""What a disk refuses, told as one message, and locks of files and folders."""

import errno
import fcntl
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from modern_llm.errors import ConfigError, ProtectedPathError

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
FULL = (errno.ENOSPC, errno.EDQUOT)


def free_bytes(folder: Path) -> int:
    """What can still be written below a folder: by its disk, and by the user's quota there.

    The quota is what the ``quota`` program tells, where there is one; a file system that counts by
    folder tells its own as the size of the disk.
    """
    free = shutil.disk_usage(folder).free
    program = shutil.which("quota")
    if program is None:
        return free
    mount = next(place for place in (folder, *folder.parents) if os.path.ismount(place))
    try:
        done = subprocess.run(
            [program, "--raw-grace", "--no-wrap", f"--filesystem={mount}"],
            capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return free
    for line in done.stdout.splitlines():
        # Filesystem, blocks of 1 KiB in use (* beyond the soft limit), soft and hard limit; 0: none
        words = line.split()[1:4]
        used, *limits = (word.rstrip("*") for word in words) if len(words) == 3 else ("",)
        if used.isdecimal() and all(limit.isdecimal() for limit in limits) and int(limits[1]):
            free = min(free, max(0, int(limits[1]) - int(used)) * 1024)
    return free


@contextmanager
def io_told(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` into one message that names the path."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> ProtectedPathError:
    """The message of a path that cannot be written, with the way out."""
    way_out = "free space" if error.errno in FULL else "make it writable"
    return ProtectedPathError(
        f"cannot write {path}: {error.strerror or error}; {way_out} or choose another output"
    )


@cache
def _tell_no_locks(folder: Path) -> None:
    from modern_llm.runtime.logs import get_logger  # and with it rich, for --help to do without

    get_logger(__name__).warning(
        "%s: its file system has no locks; nothing stops a second process that writes there", folder
    )


def lock_file(file: IO[Any], path: Path, *, wait: bool = True) -> None:
    """Lock an open file until it is closed; where there are no locks, say so and go on.

    Raises:
        BlockingIOError: another process has the lock, and ``wait`` is off.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _tell_no_locks(path.parent)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold ``folder`` for this process; the lock dies with the process, so none is ever stale.

    Args:
        folder: made where it is not there.
        wait: until another process lets go of it; what is there then may be new.

    Raises:
        ConfigError: another process holds it, and ``wait`` is off; names its pid and host.
        ProtectedPathError: the folder cannot be written.
    """
    with _held_lock(folder, wait=wait) as handle:
        with io_told(folder):
            handle.truncate(0)
            handle.write(f"pid {os.getpid()} on {socket.gethostname()}")
            handle.flush()
        yield


def _held_lock(folder: Path, *, wait: bool) -> IO[str]:
    """The open lock file of a folder, locked."""
    path = folder / ".lock"
    while True:
        with io_told(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                handle = path.open("a+")
            except FileNotFoundError:  # the folder was moved away just now
                continue
        try:
            lock_file(handle, path, wait=wait)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                    return handle
            handle.close()  # its holder moved or removed the folder: this is no lock of it
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            handle.close()
            raise ConfigError(
                f"{folder} is in use by another run ({holder}); wait, or give another --run-name"
            ) from None
