"""Names beside a result: timestamped siblings, staging, backups."""

import os
import re
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path


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
