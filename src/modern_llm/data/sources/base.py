"""What every source has: splits, row counts, rules for bad rows, and the registry."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from modern_llm.data.corruption import has_final_number
from modern_llm.errors import DataError
from modern_llm.registry import Registry

SPLITS = ("train", "validation", "test")
KINDS = {
    "text": ("text",),
    "instruct": ("prompt", "answer"),
    "pairs": ("prompt", "chosen", "rejected"),
    "problems": ("question", "answer"),
}
HASHED_SHARES = {"validation": 0.05, "test": 0.05}  # held out where a set has no splits of its own


@dataclass
class RowCounts:
    """Rows kept and dropped, by reason.

    Rows dropped by rule (equal answers, no room for the answer) are counted; malformed ones (bad
    JSON, a missing field) are also limited.
    """

    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    max_bad_rows: int = 100

    def drop(self, reason: str) -> None:
        """Count a row that a rule leaves out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def malformed(self, reason: str, where: str) -> None:
        """Count a malformed row.

        Raises:
            DataError: there are more than ``max_bad_rows``; names this one.
        """
        self.drop("malformed")
        self.check(f"{where}: {reason}; ")

    def check(self, where: str) -> None:
        """Refuse more malformed rows than the limit.

        Raises:
            DataError: begins with ``where``.
        """
        if (bad := self.dropped.get("malformed", 0)) > self.max_bad_rows:
            raise DataError(
                f"{where}{bad} malformed rows are more than data.max_bad_rows={self.max_bad_rows}"
            )


class DropRow(Exception):  # noqa: N818 - a rule, not an error
    """A row that a rule leaves out; the message is the reason."""


class Malformed(Exception):  # noqa: N818 - counted, an error only beyond the limit
    """A row that is not what its file promises; the message says why."""


class Source(ABC):
    """Rows of one kind, in a fixed order, in splits that share no prompt or problem.

    Attributes:
        kind: "text", "instruct", "pairs" or "problems"; `KINDS` has the fields of each. A prompt
            is text, or a list of turns that ends with the user's (see `templates`).
        description: name and options, for reports.
    """

    kind: str
    description: str

    @abstractmethod
    def rows(self, split: str, counts: RowCounts | None = None) -> Iterator[dict[str, Any]]:
        """Rows of a split; those left out are counted in ``counts``.

        Raises:
            DataError: the split cannot be had, or too many rows are malformed.
        """

    def check(self, split: str) -> None:
        """Refuse at once a split that cannot be had; reads its first row and downloads nothing.

        Raises:
            DataError: files are missing or cannot be read, no row is good, or the set has no such
                split.
        """
        check_split(split)

    def fetch(self, split: str) -> None:
        """Have a copy of a split on this disk, so that it is read without a network.

        Raises:
            DataError: as `check`, or it cannot be fetched.
        """
        self.check(split)

    @abstractmethod
    def fingerprint(self, split: str = "train") -> str:
        """Hash of all that decides the rows of a split: content or revision, and options."""


SOURCES = Registry("data source", base=Source, sizes=("data",))


def check_split(split: str) -> str:
    """Return ``split`` when it is one of the three.

    Raises:
        DataError: it is not.
    """
    if split not in SPLITS:
        raise DataError(f"split '{split}': use one of {', '.join(SPLITS)}")
    return split


def check_first_row(
    source: Source, split: str, *, where: str, max_bad_rows: int, way_out: str = ""
) -> None:
    """Refuse a split without a good row.

    Args:
        source: read up to its first row of the split.
        split: "train", "validation" or "test".
        where: the file or set, for the error.
        max_bad_rows: malformed rows that may come before.
        way_out: what to do where there is none, for the error.

    Raises:
        DataError: there is no row, or too many before it are malformed.
    """
    counts = RowCounts(max_bad_rows=max_bad_rows)
    if next(source.rows(split, counts), None) is None:
        reasons = "".join(f", {n} {why}" for why, n in sorted(counts.dropped.items()))
        raise DataError(f"{where}: no row for the {split} split{reasons}{way_out}")


def hashed_split(key: str, shares: Mapping[str, float]) -> str:
    """Split of a prompt or text by its hash: the same whatever the file or order it comes in."""
    position = int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:8], "big")
    rest = position / 2**64
    for split, share in shares.items():
        if rest < share:
            return split
        rest -= share
    return "train"


def text_field(raw: Mapping[str, Any], name: str) -> str:
    """A string of a raw row.

    Raises:
        Malformed: the field is missing or not valid text.
    """
    if name not in raw:
        raise Malformed(f"no field '{name}' (there are: {', '.join(map(str, raw)) or 'none'})")
    value = raw[name]
    if not isinstance(value, str):
        raise Malformed(f"field '{name}' is {type(value).__name__}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Malformed(f"field '{name}' is not valid Unicode") from None
    return value


def checked_row(kind: str, row: dict[str, Any]) -> dict[str, Any]:
    """Apply the rules of a kind: no empty text, no empty or equal answers.

    Raises:
        DropRow: a rule leaves the row out.
        Malformed: a problem's answer does not say its result.
    """
    if kind == "text":
        if not row["text"].strip():
            raise DropRow("empty text")
        return row
    if kind == "pairs":
        if not (row["chosen"].strip() and row["rejected"].strip()):
            raise DropRow("empty answer")
        if row["chosen"].strip() == row["rejected"].strip():
            raise DropRow("equal answers")
    elif not row["answer"].strip():
        raise DropRow("empty answer")
    prompt = row["question"] if kind == "problems" else row["prompt"]
    if isinstance(prompt, str) and not prompt.strip():
        raise DropRow("empty prompt")
    if kind == "problems" and not has_final_number(row["answer"]):
        raise Malformed("field 'answer' has no line '#### number'")
    return row
