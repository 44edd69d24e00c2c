"""Where local data files are: the data root, gzipped or not, and their content hashes."""

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from modern_llm.config import DataConfig
from modern_llm.errors import DataError
from modern_llm.runtime.artifacts import sha256_file, sha256_json, write_text

ROOT_VARIABLE = "MODERN_LLM_DATA"


def data_root(data: DataConfig) -> Path | None:
    """Folder of local data sets: ``data.root``, else the one that the environment names.

    Raises:
        DataError: a folder is named and is not there.
    """
    named = str(data.root) if data.root is not None else os.environ.get(ROOT_VARIABLE, "")
    if not named:
        return None
    root = Path(named).expanduser()
    if not root.is_dir():
        where = "data.root" if data.root is not None else ROOT_VARIABLE
        raise DataError(f"{where}={named}: no such folder")
    return root


def find_local(data: DataConfig, *names: str) -> Path | None:
    """First of ``names`` (paths below the data root) that is there, as it is or gzipped."""
    root = data_root(data)
    if root is None:
        return None
    for name in names:
        for path in (root / name, root / f"{name}.gz"):
            if path.is_file():
                return path
    return None


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """A text file, gzipped when its name ends in ``.gz``; line ends are kept as they are.

    Raises:
        DataError: missing, unreadable, not UTF-8, or a damaged gzip; names the file.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
                yield file
        else:
            with path.open(encoding="utf-8", newline="\n") as file:
                yield file
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def content_hash(path: Path, data: DataConfig) -> str:
    """Hex sha256 of a file, remembered under the cache folder.

    Raises:
        DataError: no such file.
    """
    return remembered_hash(path, data.cache_dir / "hashes")


def remembered_hash(path: Path, folder: Path) -> str:
    """Hex sha256 of a file; remembered in ``folder`` by path, size and time of change.

    Raises:
        DataError: no such file.
    """
    try:
        state = path.stat()
        key = sha256_json([str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ino])
        memo = folder / f"{key[:32]}.txt"
        if memo.is_file() and len(known := memo.read_text().strip()) == 64:
            return known
        digest = sha256_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    write_text(memo, digest + "\n", on_exists="skip")
    return digest
