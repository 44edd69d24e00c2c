"""The door to the Hugging Face hub, for data sets that are not below the data root."""

import os
import re
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from modern_llm.data.lookup import ROOT_VARIABLE
from modern_llm.errors import DataError

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubSet:
    """One data set of the hub at a pinned commit.

    Attributes:
        repository: "owner/name".
        revision: commit of 40 hex digits.
        config: configuration of the set, if it has several.
        data_dir: folder inside the repository, if only that is wanted.
        splits: our split -> the set's; those left out are not there.
    """

    repository: str
    revision: str
    config: str | None = None
    data_dir: str | None = None
    splits: dict[str, str] = field(
        default_factory=lambda: {"train": "train", "validation": "validation", "test": "test"}
    )

    @property
    def address(self) -> str:
        """Repository, part and revision in one line."""
        part = "".join(f"/{p}" for p in (self.config, self.data_dir) if p)
        return f"{self.repository}{part}@{self.revision}"

    def check(self, split: str, wanted: str) -> None:
        """Where the hub is out of reach, look whether its cache on this disk has the split.

        Raises:
            DataError: as `rows`.
        """
        stay_offline_if_unreachable()
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            next(self.rows(split, wanted), None)

    def rows(self, split: str, wanted: str) -> Iterator[tuple[str, Any]]:
        """Raw rows of a split of ours, with where each is from.

        Args:
            split: "train", "validation" or "test".
            wanted: local file that would serve as well, for the error.

        Raises:
            DataError: neither is to be had; says both ways out.
        """
        stay_offline_if_unreachable()
        try:
            import datasets

            table = datasets.load_dataset(
                self.repository,
                self.config,
                data_dir=self.data_dir,
                split=self.splits[split],
                revision=self.revision,
            )
            for number, row in enumerate(table, start=1):
                yield f"{self.address} {split} row {number}", row
        except Exception as error:  # network, hub and library all have their own kinds
            raise DataError(
                f"{self.repository}: the {split} split is not below {ROOT_VARIABLE} and the hub "
                f"did not give it ({type(error).__name__}: {_first_line(error)}). Either set "
                f"{ROOT_VARIABLE} (or data.root) to a folder with {wanted}, or let this machine "
                f"reach the hub once for {self.address}, or run 'modern-llm prepare-data' with "
                "this config where it can be reached"
            ) from error


def resolved(repository: str, revision: str) -> str:
    """The commit that a branch or tag of a data set stands for; a commit stands for itself.

    Raises:
        DataError: the hub cannot be asked.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    try:
        import huggingface_hub

        info = huggingface_hub.HfApi().dataset_info(repository, revision=revision)
    except Exception as error:  # as above
        raise DataError(
            f"{repository}: revision '{revision}' cannot be resolved to a commit "
            f"({type(error).__name__}: {_first_line(error)}); give the 40 hex digits"
        ) from error
    return str(info.sha)


@cache
def stay_offline_if_unreachable() -> None:
    """Answer at once where there is no network: from the hub's cache on disk, or with an error.

    Without this each file is asked for six times with growing pauses. Proxies are left alone.
    """
    if "huggingface_hub" in sys.modules or urllib.request.getproxies():
        return
    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((endpoint.hostname or "", endpoint.port or 443), 5).close()
    except OSError:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"
