"""What an evaluation returns: a number with its protocol, interval and count, or a reason."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

Interval = tuple[float, float]


@dataclass(frozen=True)
class Score:
    """One number.

    Attributes:
        key: what was measured and by which protocol, e.g. ``wikitext2.test/ctx256/stride128/bos``.
        metric: name of the number, e.g. ``bits_per_byte``.
        value: the point estimate.
        ci95: ends of the 95 % interval, or ``None`` where none can be stated.
        n: count behind the value, in units of the metric (tokens, words, problems, pairs).
        note: how the interval was made, and what a reader must know.
    """

    key: str
    metric: str
    value: float
    ci95: Interval | None
    n: int
    note: str = ""


@dataclass(frozen=True)
class NotEvaluated:
    """A number that cannot be had here, and why."""

    what: str
    why: str


Result = Score | NotEvaluated


def split_results(results: Iterable[Result]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Plain rows for result files: ``(scores, not_evaluated)``."""
    scores: list[dict[str, Any]] = []
    missing: list[dict[str, Any]] = []
    for result in results:
        (scores if isinstance(result, Score) else missing).append(asdict(result))
    return scores, missing
