"""What each metric is called, how it is written, and which way is better."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from modern_llm.reporting.tables import MISSING, fixed, whole
from modern_llm.reporting.values import Point, Score


@dataclass(frozen=True)
class Measure:
    """A family of metrics that share a column.

    Args:
        name: id of the family.
        label: heading of its column.
        needles: groups; a metric belongs here when its name holds the first of a group, and its
            name or its key the others.
        is_fraction: values are in 0..1 and are written as percent.
        higher_is_better: ``None`` when neither way is.
        digits: digits after the point where it is no fraction.
    """

    name: str
    label: str
    needles: tuple[tuple[str, ...], ...]
    is_fraction: bool = False
    higher_is_better: bool | None = True
    digits: int = 3


MEASURES = (  # the first that fits
    Measure("difference", "", ((" - ",),), True),  # paired, in points
    Measure("flexible", "exact match (flexible)", (("exact_match", "flexible"),), True),
    Measure("strict", "exact match (strict)", (("exact_match",),), True),
    Measure("gold_bits", "gold-answer bits per byte", (("bits_per_byte", "/gold"),), False, False),
    Measure("bits", "bits per byte", (("bits_per_byte",),), False, False),
    Measure("word_perplexity", "word perplexity", (("word_perplexity",),), False, False, 2),
    Measure("perplexity", "token perplexity", (("perplexity",),), False, False, 2),
    Measure("longer", "longer-answer baseline", (("longer",),), True, None),
    Measure("implicit", "implicit-reward accuracy", (("implicit_reward",),), True),
    Measure("per_token", "preference accuracy per token", (("preference", "per_token"),), True),
    Measure("preference", "preference accuracy", (("preference",), ("pair_accuracy",)), True),
    Measure("loss", "loss", (("loss",),), False, False),
    Measure("auroc", "AUROC", (("auroc",),)),
    Measure("ece", "ECE", (("ece",),), False, False),
    Measure("choice", "", (("majority",), ("most_likely",), ("best_of",)), True),
    Measure("fraction", "", (("accuracy",), ("pass@",)), True),
)
OTHER = Measure("other", "", (), False, None)


def measure_of(score: Score) -> Measure:
    """Family of a score, by the name of its metric and its key."""
    named, full = score.metric.lower(), f"{score.metric} {score.key}".lower()
    for measure in MEASURES:
        for group in measure.needles:
            if group[0] in named and all(needle in full for needle in group):
                return measure
    return OTHER


def written(score: Score | None) -> str:
    """``62.0 % [55.1, 68.4] (n=200)``; without an interval or a count, without that part."""
    if score is None or score.value is None:
        return MISSING
    measure = measure_of(score)
    if measure.name == "difference":
        text = f"{100 * score.value:+.1f} points"
        ends = score.ci95 and tuple(f"{100 * end:+.1f}" for end in score.ci95)
    elif measure.is_fraction:
        text = f"{100 * score.value:.1f} %"
        ends = score.ci95 and tuple(f"{100 * end:.1f}" for end in score.ci95)
    else:
        text = fixed(score.value, measure.digits)
        ends = score.ci95 and tuple(fixed(end, measure.digits) for end in score.ci95)
    if ends:
        text += f" [{ends[0]}, {ends[1]}]"
    return text if score.n is None else f"{text} (n={whole(score.n)})"


def written_point(point: Point | None, n: int | None) -> str:
    """A point of a curve of fractions, written like a score."""
    if point is None:
        return MISSING
    return written(Score("", "accuracy", point.value, (point.lo, point.hi), n))


def of_measure(scores: Iterable[Score], name: str) -> list[Score]:
    """Scores of one family, in their order."""
    return [score for score in scores if measure_of(score).name == name]


def same_protocol(score: Score, scores: Iterable[Score]) -> Score | None:
    """The score of another model by the same metric and protocol."""
    return next((s for s in scores if (s.metric, s.key) == (score.metric, score.key)), None)


def column(models: Sequence[Sequence[Score]], name: str) -> list[Score | None]:
    """One score of a family for each model, all by one protocol: the one that most models have."""
    candidates = [score for scores in models for score in of_measure(scores, name)]
    columns = [[same_protocol(wanted, scores) for scores in models] for wanted in candidates]
    if not columns:
        return [None] * len(models)
    return max(columns, key=lambda cells: sum(cell is not None for cell in cells))


def change(before: Score, after: Score) -> str:
    """``+58.0 points`` for fractions, else the difference and its percentage."""
    if before.value is None or after.value is None:
        return MISSING
    measure, gain = measure_of(after), after.value - before.value
    if measure.is_fraction:
        return f"{100 * gain:+.1f} points"
    relative = f" ({100 * gain / before.value:+.1f} %)" if before.value else ""
    return f"{gain:+,.{measure.digits}f}{relative}"


def verdict(before: Score, after: Score) -> str:
    """Better, worse, or not distinguishable, from the two intervals."""
    sign = measure_of(after).higher_is_better
    if before.value is None or after.value is None or sign is None:
        return MISSING
    if before.ci95 is None or after.ci95 is None:
        better = (after.value > before.value) == sign and after.value != before.value
        return ("better" if better else "not better") + ", no interval"
    if before.ci95[0] <= after.ci95[1] and after.ci95[0] <= before.ci95[1]:
        return "intervals overlap"
    return "better" if (after.value > before.value) == sign else "worse"


def verdict_of_difference(score: Score) -> str:
    """Better, worse, or not distinguishable, from the interval of a paired difference."""
    if score.ci95 is None:
        return MISSING
    if score.ci95[0] > 0:
        return "better"
    return "worse" if score.ci95[1] < 0 else "not distinguishable"
