"""Typed, tolerant access to JSON that another process wrote, perhaps not to its end.

What is absent reads as ``None`` or empty; what has the wrong type does too and is named in a list
of faults. Nothing here raises, so that a report can say what is damaged and show the rest.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Fields:
    """One JSON object, read field by field.

    Args:
        value: the decoded object; anything else counts as empty and is a fault.
        where: file and place in it, for the faults.
        faults: list that collects what is wrong, one sentence each.
    """

    def __init__(self, value: object, where: str, faults: list[str]) -> None:
        self.where, self.faults = where, faults
        self.raw: dict[str, Any] = value if isinstance(value, dict) else {}
        if value is not None and not isinstance(value, dict):
            self._fault("", value, "an object")

    def __bool__(self) -> bool:
        return bool(self.raw)

    def _place(self, key: str) -> str:
        separator = "." if key and not self.where.endswith(": ") else ""
        return f"{self.where}{separator}{key}"

    def _fault(self, key: str, value: object, expected: str) -> None:
        shown = json.dumps(value, default=str)[:60]
        self.faults.append(f"{self._place(key)} is {shown}, expected {expected}")

    def number(self, key: str) -> float | None:
        """A finite number, else ``None``."""
        value = self.raw.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value) if math.isfinite(value) else None
        if value is not None:
            self._fault(key, value, "a number")
        return None

    def integer(self, key: str) -> int | None:
        """A whole number, else ``None``."""
        value = self.number(key)
        if value is not None and value != int(value):
            self._fault(key, value, "a whole number")
            return None
        return None if value is None else int(value)

    def text(self, key: str) -> str:
        """A string; absent is empty."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, str):
            self._fault(key, value, "text")
        return value if isinstance(value, str) else ""

    def flag(self, key: str) -> bool | None:
        """True or false, else ``None``."""
        value = self.raw.get(key)
        return value if isinstance(value, bool) else None

    def fields(self, key: str) -> "Fields":
        """A nested object; absent is empty."""
        return Fields(self.raw.get(key), self._place(key), self.faults)

    def list(self, key: str) -> list[Any]:
        """A list of anything; absent is empty."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, list):
            self._fault(key, value, "a list")
        return value if isinstance(value, list) else []

    def items(self, key: str) -> Iterator["Fields"]:
        """The objects of a list."""
        for index, value in enumerate(self.list(key)):
            yield Fields(value, f"{self._place(key)}[{index}]", self.faults)

    def interval(self, key: str) -> tuple[float, float] | None:
        """A pair of finite numbers ``[low, high]``, else ``None``."""
        value = self.raw.get(key)
        if value is None:
            return None
        ends = value if isinstance(value, list) else []
        good = [
            float(v)
            for v in ends
            if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
        ]
        if len(ends) != 2 or len(good) != 2:
            self._fault(key, value, "[low, high]")
            return None
        return good[0], good[1]


def read_json(path: Path, where: str, faults: list[str]) -> Fields | None:
    """An object from a file: ``None`` when there is none; damaged is a fault and empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"{where} cannot be read: {error}")
        return Fields({}, f"{where}: ", faults)
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        faults.append(f"{where} is damaged: not JSON ({error})")
        return Fields({}, f"{where}: ", faults)
    return Fields(value, f"{where}: ", faults)


def read_rows(path: Path, where: str, faults: list[str]) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file in order; damaged lines are a fault and passed over."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        faults.append(f"{where} cannot be read: {error}")
        return []
    rows: list[dict[str, Any]] = []
    damaged: list[int] = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            rows.append(value)
        else:
            damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        faults.append(f"{where}: {len(damaged)} damaged row(s) passed over (line {shown})")
    return rows
