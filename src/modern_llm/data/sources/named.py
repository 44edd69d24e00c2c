"""Base of the data sets known by name: local files first, then the hub."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from modern_llm.config import DataConfig
from modern_llm.data.lookup import content_hash, find_local
from modern_llm.data.sources.base import (
    DropRow,
    Malformed,
    RowCounts,
    Source,
    check_first_row,
    check_split,
    hashed_split,
)
from modern_llm.data.sources.copies import copied_rows, copy_set
from modern_llm.data.sources.files import Located, converted, read_rows, row_key
from modern_llm.data.sources.hub import HubSet, resolved
from modern_llm.errors import DataError
from modern_llm.runtime.artifacts import sha256_json


class NamedSource(Source):
    """A data set that is looked up below the data root, then on the hub.

    A subclass says where its files are, which splits a stored split serves (`stored`), and how a
    raw row is read.

    Attributes:
        name: registered name.
        hub: the sets on the hub; their rows follow each other.
        files: names below the data root by stored split; the first that is there is taken for
            each entry, gzipped or not.
    """

    name: str
    hub: tuple[HubSet, ...] = ()

    def __init__(self, data: DataConfig, *, revision: str | None = None) -> None:
        self.data, self.revision = data, revision
        self.description = self.name

    def files(self, stored: str) -> list[tuple[str, ...]]:
        """Files of a stored split, each with its alternative names below the data root."""
        return []

    def stored(self, split: str) -> tuple[str, dict[str, float]]:
        """The stored split that holds ``split``, and the shares cut from it by hash.

        Raises:
            DataError: the set has no such split.
        """
        return split, {}

    def rows(self, split: str, counts: RowCounts | None = None) -> Iterator[dict[str, Any]]:
        """Rows of a split, from local files if all are there, else from the hub."""
        stored, shares = self.stored(check_split(split))
        counts = counts or RowCounts(max_bad_rows=self.data.max_bad_rows)
        for where, raw in self._raw(stored, counts):
            try:
                for row in self.convert(raw):
                    if hashed_split(row_key(self.kind, row), shares) == split or not shares:
                        yield row
            except DropRow as rule:
                counts.drop(str(rule))
            except Malformed as fault:
                counts.malformed(str(fault), where)

    def fingerprint(self, split: str = "train") -> str:
        """Hash of the files' content or the hub's commit, and of how the split is cut."""
        stored, shares = self.stored(check_split(split))
        local = self.local(stored)
        content = (
            [content_hash(path, self.data) for path in local]
            if local
            else [hub.address for hub in self._hub_sets()]
        )
        return sha256_json([self.name, self.description, split, stored, shares, content])

    def check(self, split: str) -> None:
        """See `Source`; where the hub can be reached, it is taken to have the set."""
        stored, _ = self.stored(check_split(split))
        if self.local(stored):
            check_first_row(self, split, where=self.name, max_bad_rows=self.data.max_bad_rows)
            return
        for hub in self._hub_with(stored):
            if copied_rows(hub, stored, self.data.cache_dir) is None:
                hub.check(stored, self._wanted(stored))

    def fetch(self, split: str) -> None:
        """See `Source`; what is on the hub only is copied below the cache folder."""
        stored, _ = self.stored(check_split(split))
        if not self.local(stored):
            for hub in self._hub_with(stored):
                copy_set(hub, stored, self._wanted(stored), self.data.cache_dir)
        self.check(split)

    def local(self, stored: str) -> list[Path]:
        """Local files of a stored split; empty when one of them is missing."""
        found = [find_local(self.data, *names) for names in self.files(stored)]
        return [path for path in found if path is not None] if all(found) else []

    def read(self, path: Path, stored: str, counts: RowCounts) -> Iterator[Located]:
        """Raw rows of a local file."""
        return read_rows(path, counts)

    def from_hub(self, rows: Iterator[Located], stored: str) -> Iterator[Located]:
        """Raw rows as `read` gives them, from those of the hub."""
        return rows

    def convert(self, raw: Any) -> Iterator[dict[str, Any]]:
        """The rows that a raw one stands for.

        Raises:
            DropRow: a rule leaves it out.
            Malformed: it is not what the set promises.
        """
        yield converted(self.kind, raw)

    def _raw(self, stored: str, counts: RowCounts) -> Iterator[Located]:
        local = self.local(stored)
        for path in local:
            yield from self.read(path, stored, counts)
        if local:
            return
        for hub in self._hub_with(stored):
            rows = copied_rows(hub, stored, self.data.cache_dir)
            if rows is None:
                rows = hub.rows(stored, self._wanted(stored))
            yield from self.from_hub(rows, stored)

    def _wanted(self, stored: str) -> str:
        """Local files that would serve, for errors."""
        return " and ".join(names[0] for names in self.files(stored)) or "its files"

    def _hub_with(self, stored: str) -> Iterator[HubSet]:
        for hub in self._hub_sets():
            if stored not in hub.splits:
                raise DataError(f"{self.name}: the set has no split '{stored}'")
            yield hub

    def _hub_sets(self) -> list[HubSet]:
        if self.revision is None:
            return list(self.hub)
        return [replace(hub, revision=_resolved(hub.repository, self.revision)) for hub in self.hub]


_resolved = cache(resolved)
