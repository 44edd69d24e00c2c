"""Markdown that foreign text cannot break, aligned tables, and numbers as people read them."""

import html
import re
from collections.abc import Sequence

MISSING = "n/a"
# Every character that could begin markup in a table cell or a paragraph.
_ACTIVE = re.compile(r"[&<>|`*\[\]\\~$^@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def escape(text: str, *, limit: int | None = None) -> str:
    """Text as literal text in a table cell: no markup, no HTML, no links; newlines are ``<br>``.

    Args:
        text: anything, also what a model wrote.
        limit: characters of ``text`` to keep; what is cut is marked.
    """
    cut = limit is not None and len(text) > limit
    text = text[:limit].replace("\r\n", "\n").replace("\t", "    ")
    text = _CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}", text)
    text = _ACTIVE.sub(lambda m: f"&#{ord(m[0])};", text)
    return text.replace("\n", "<br>") + (" [...]" if cut else "")


def plain(cell: str) -> str:
    """An escaped cell as it reads, for the terminal."""
    return html.unescape(cell.replace("<br>", " "))


def fence(text: str, language: str = "text") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    text = _CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}", text.replace("\r\n", "\n"))
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def code(text: str) -> str:
    """A short inline code span of one line; safe in a table cell."""
    plain = re.sub(r"[`|\s]+", " ", _CONTROL.sub("?", text)).strip()
    return f"`{plain}`" if plain else MISSING


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, right: str = "") -> str:
    """A markdown table whose columns line up in the source too.

    Args:
        heads: column titles.
        rows: cells, already escaped; empty cells stay empty.
        right: one letter a column, ``r`` for right-aligned, anything else for left.
    """
    rights = [letter == "r" for letter in right.ljust(len(heads), "l")]
    lines = [list(heads), *(list(row) for row in rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(cells, widths, rights, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = (
        "-" * (width - 1) + ":" if is_right else "-" * width
        for width, is_right in zip(widths, rights, strict=True)
    )
    return "\n".join([line(lines[0]), f"| {' | '.join(rule)} |", *map(line, lines[1:])])


def whole(value: float | None) -> str:
    """1234567 -> ``1,234,567``."""
    return MISSING if value is None else f"{value:,.0f}"


def short(value: float | None) -> str:
    """1234567 -> ``1.23 M``."""
    if value is None:
        return MISSING
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:  # so that 999999 is 1 M and not 1e+03 k
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


def fixed(value: float | None, digits: int = 3) -> str:
    """A number with fixed digits."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """A fraction as percent, one digit."""
    return MISSING if value is None else f"{100 * value:.1f} %"


def duration(seconds: float | None) -> str:
    """Seconds as people say them: ``42 s``, ``3 min 5 s``, ``2 h 10 min``."""
    if seconds is None:
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    total = round(seconds)
    hours, minutes, rest = total // 3600, total // 60 % 60, total % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def digest(sha256: str) -> str:
    """The first twelve characters of a hash, as code."""
    return code(sha256[:12])
