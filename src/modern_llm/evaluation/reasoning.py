"""Scores of sampled solutions: pass@k, majority vote, the most likely, a verifier's best, oracle.

All values are expectations over the drawn samples where that is cheap, and all intervals are
bootstraps over problems: samples of one problem are not independent.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import combinations
from typing import Any

import numpy as np

from modern_llm.evaluation.answers import check_steps, extract_answer, gold_answer
from modern_llm.evaluation.calibration import (
    Bin,
    auroc_score,
    auroc_within_score,
    ece_score,
    reliability,
)
from modern_llm.evaluation.intervals import bootstrap, bootstrap_mean, share_interval
from modern_llm.evaluation.scores import NotEvaluated, Result, Score

MAX_SUBSETS = 500  # majority vote: all subsets up to this many, else disjoint blocks


@dataclass(frozen=True)
class Graded:
    """The samples of one problem.

    Attributes:
        answers: final answer of each sample; ``None`` where it has none.
        correct: whether each is right.
        scores: verifier's score of each, in [0, 1]; ``None`` without a verifier.
        logprobs: log-probability of each under the policy that drew it, in nats.
    """

    answers: tuple[Decimal | None, ...]
    correct: tuple[bool, ...]
    scores: tuple[float, ...] | None = None
    logprobs: tuple[float, ...] | None = None


def grade_samples(
    gold: str,
    samples: Sequence[str],
    *,
    scores: Sequence[float] | None = None,
    logprobs: Sequence[float] | None = None,
    flexible: bool = False,
) -> Graded:
    """Extract and grade the samples of one problem.

    Args:
        gold: reference, ``... #### 42`` or a bare number.
        samples: sampled solutions.
        scores: verifier's score of each sample.
        logprobs: nats of each sample under the policy.
        flexible: take the last number instead of ``#### number``.

    Raises:
        DataError: the reference has no number.
    """
    for values in (scores, logprobs):
        if values is not None and len(values) != len(samples):
            raise ValueError(f"{len(values)} scores for {len(samples)} samples")
    wanted = gold_answer(gold)
    answers = tuple(extract_answer(text, flexible=flexible) for text in samples)
    correct = tuple(answer == wanted for answer in answers)
    chosen, likely = (None if v is None else tuple(map(float, v)) for v in (scores, logprobs))
    return Graded(answers, correct, chosen, likely)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of ``k`` samples is right (arXiv:2107.03374, eq. 1).

    Args:
        n: samples drawn.
        c: right ones among them.
        k: at most ``n``.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def oracle(problem: Graded, n: int) -> float:
    """Expected accuracy of a perfect choice among ``n`` samples: pass@n."""
    return pass_at_k(len(problem.correct), sum(problem.correct), n)


def majority(problem: Graded, n: int) -> float:
    """Expected accuracy of the most frequent answer among ``n`` of the samples.

    Ties go to the answer that occurs first; samples without an answer do not vote. The mean is
    over all subsets when there are at most 500, else over disjoint blocks of ``n``.
    """
    total = len(problem.answers)
    if not 1 <= n <= total:
        raise ValueError(f"majority of {n} needs at least {n} samples, got {total}")
    subsets: list[tuple[int, ...]]
    if math.comb(total, n) <= MAX_SUBSETS:
        subsets = list(combinations(range(total), n))
    else:
        subsets = [tuple(range(at, at + n)) for at in range(0, total - n + 1, n)]
    right = {a for a, ok in zip(problem.answers, problem.correct, strict=True) if ok}
    won = 0
    for subset in subsets:
        votes = Counter(problem.answers[i] for i in subset if problem.answers[i] is not None)
        won += bool(votes) and votes.most_common(1)[0][0] in right
    return won / len(subsets)


def best_of_n(problem: Graded, n: int) -> float:
    """Expected accuracy of the sample that the verifier scores highest among ``n``."""
    return _highest(problem.correct, problem.scores, n)


def most_likely(problem: Graded, n: int) -> float:
    """Expected accuracy of the sample that the policy itself finds most probable among ``n``."""
    return _highest(problem.correct, problem.logprobs, n)


def _highest(correct: Sequence[bool], scores: Sequence[float] | None, n: int) -> float:
    """Expected accuracy of the highest score of ``n`` samples, over all subsets, exactly.

    The sample of rank r (from 0) among N is the best of a random subset with chance
    ``C(N-1-r, n-1) / C(N, n)``. Equal scores are broken at random.
    """
    total = len(correct)
    if scores is None or not 1 <= n <= total:
        raise ValueError(f"best of {n} needs at least {n} scored samples")
    chance = [math.comb(total - 1 - rank, n - 1) / math.comb(total, n) for rank in range(total)]
    order = sorted(range(total), key=lambda i: -scores[i])
    expected = 0.0
    at = 0
    while at < total:
        tied = [i for i in order[at:] if scores[i] == scores[order[at]]]
        accuracy = sum(correct[i] for i in tied) / len(tied)
        expected += accuracy * sum(chance[at : at + len(tied)])
        at += len(tied)
    return expected


@dataclass
class ReasoningReport:
    """Scores and curves of one set of samples."""

    scores: list[Score] = field(default_factory=list)
    not_evaluated: list[NotEvaluated] = field(default_factory=list)
    n_problems: int = 0
    base_rate: float | None = None  # share of right samples
    curves: dict[str, Any] | None = None
    auroc: Score | None = None
    ece: Score | None = None
    bins: list[Bin] = field(default_factory=list)

    def add(self, result: Result) -> Score | None:
        """File a result under scores or under what was not evaluated."""
        if isinstance(result, Score):
            self.scores.append(result)
            return result
        self.not_evaluated.append(result)
        return None


def reasoning_report(
    problems: Sequence[Graded], *, key: str, ns: Sequence[int] = (1, 2, 4, 8)
) -> ReasoningReport:
    """Curves of every choice among n, paired differences to the verifier's, AUROC, calibration.

    Args:
        problems: each with the same count of samples.
        key: of the results, e.g. ``gsm8k.test/T0.7``.
        ns: sizes of the curves; those above the count of samples are left out.

    Returns:
        A report whose curves are ``None``, with the reason in ``not_evaluated``, when there are no
        problems or no sample of any is right.
    """
    report = ReasoningReport(n_problems=len(problems))
    if not problems:
        report.add(NotEvaluated(f"{key} exact match", "there are no problems"))
        return report
    n_samples = len(problems[0].correct)
    if n_samples == 0 or any(len(p.correct) != n_samples for p in problems):
        raise ValueError("all problems need the same count of samples, at least one")
    pass1 = [sum(p.correct) / n_samples for p in problems]
    report.base_rate = float(np.mean(pass1))
    some_right = report.base_rate > 0
    note = f"mean over {n_samples} samples a problem" if n_samples > 1 else "one sample a problem"
    if not some_right:
        note += "; no sample is right, only the interval's upper end says something"
    report.add(_share(key, "pass@1", pass1, note))
    if not some_right:
        why = f"none of {n_samples} samples is right for any of {len(problems)} problems"
        report.add(NotEvaluated(f"{key} pass@n, majority and best-of-n", why))
    elif n_samples > 1:
        sizes = [n for n in ns if n <= n_samples]
        _add_curves(report, problems, pass1, key=key, sizes=sizes)
    if all(p.scores is not None for p in problems):
        _add_calibration(report, problems, key=key)
    return report


def _share(key: str, metric: str, values: Sequence[float], note: str) -> Score:
    return Score(key, metric, float(np.mean(values)), share_interval(values), len(values), note)


def _point(values: Sequence[float]) -> dict[str, float | None]:
    low, high = share_interval(values) or (None, None)
    return {"value": float(np.mean(values)), "lo": low, "hi": high}


def _add_curves(
    report: ReasoningReport,
    problems: Sequence[Graded],
    pass1: list[float],
    *,
    key: str,
    sizes: list[int],
) -> None:
    methods: dict[str, Callable[[Graded, int], float]] = {"majority": majority, "oracle": oracle}
    if all(p.logprobs is not None for p in problems):
        methods["most_likely"] = most_likely
    if all(p.scores is not None for p in problems):
        methods["verifier"] = best_of_n
    curves: dict[str, Any] = {"n": sizes, "pass1": _point(pass1), "verifier": None}
    largest: dict[str, list[float]] = {}
    for name, method in methods.items():
        rows = [[method(p, n) for p in problems] for n in sizes]
        curves[name] = [_point(row) for row in rows]
        largest[name] = rows[-1]
    report.curves = curves
    top = sizes[-1]
    names = {
        "oracle": f"pass@{top}",
        "majority": f"majority@{top}",
        "most_likely": f"most_likely_of_{top}",
        "verifier": f"best_of_{top}",
    }
    for name, values in largest.items():
        report.add(_share(key, names[name], values, "bootstrap over problems"))
    if "verifier" in largest:
        others = {**largest, "pass@1": pass1}
        for other in ("majority", "most_likely", "pass@1"):
            if other not in others:
                continue
            gain = np.subtract(largest["verifier"], others[other])
            metric = f"best_of_{top} - {other}"
            interval = bootstrap_mean(gain)
            note = "paired difference; bootstrap over problems"
            report.add(Score(key, metric, float(gain.mean()), interval, len(gain), note))


def _add_calibration(report: ReasoningReport, problems: Sequence[Graded], *, key: str) -> None:
    scores = [s for p in problems for s in p.scores or ()]
    labels = [ok for p in problems for ok in p.correct]
    groups = [i for i, p in enumerate(problems) for _ in p.correct]
    report.auroc = report.add(auroc_score(scores, labels, groups, key=key))
    report.add(auroc_within_score(scores, labels, groups, key=key))
    report.ece = report.add(ece_score(scores, labels, groups, key=key))
    report.bins = reliability(scores, labels, groups)


def exact_match(gold: Sequence[str], answers: Sequence[str], *, key: str) -> list[Result]:
    """Strict and flexible exact match of one answer a problem.

    Also the share of right ``<<a*b=c>>`` calculator steps, where the answers have any.

    Args:
        gold: references.
        answers: one solution for each.
        key: of the results.
    """
    n = len(gold)
    if n == 0:
        return [NotEvaluated(f"{key} exact match", "there are no problems")]
    results: list[Result] = []
    for metric, flexible in (("exact_match", False), ("exact_match_flexible", True)):
        right = [
            grade_samples(reference, [answer], flexible=flexible).correct[0]
            for reference, answer in zip(gold, answers, strict=True)
        ]
        how = "last number" if flexible else "first '#### number'"
        results.append(_share(key, metric, [float(ok) for ok in right], how))
    steps = np.array([check_steps(answer) for answer in answers], dtype=np.float64)
    n_steps = int(steps[:, 1].sum())
    if n_steps:
        interval = bootstrap(steps, lambda sums: sums[:, 0] / sums[:, 1])
        note = "right <<a*b=c>> steps among those written; bootstrap over problems"
        value = float(steps[:, 0].sum()) / n_steps
        results.append(Score(key, "step_accuracy", value, interval, n_steps, note))
    return results
