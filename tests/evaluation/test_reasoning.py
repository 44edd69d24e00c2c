import itertools
import math
import random
from collections import Counter
from decimal import Decimal

import numpy as np
import pytest

from modern_llm.errors import DataError
from modern_llm.evaluation.reasoning import (
    Graded,
    best_of_n,
    exact_match,
    grade_samples,
    majority,
    most_likely,
    oracle,
    pass_at_k,
    reasoning_report,
)


def random_problem(rng: random.Random, n: int, *, ties: bool) -> Graded:
    answers = tuple(rng.choice([None, *map(Decimal, (1, 2, 3))]) for _ in range(n))
    scores = tuple(rng.choice([0.1, 0.5, 0.9]) if ties else rng.random() for _ in range(n))
    logprobs = tuple(-10 * rng.random() for _ in range(n))
    return Graded(answers, tuple(a == 1 for a in answers), scores, logprobs)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations(range(n), k))
        expected = sum(any(i < c for i in s) for s in subsets) / len(subsets)
        assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_matches_the_product_of_the_paper() -> None:
    for n, c, k in [(200, 3, 100), (200, 150, 100), (50, 0, 10)]:
        product = (
            1.0 if n - c < k else 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))
        )
        assert pass_at_k(n, c, k) == pytest.approx(product, abs=1e-12)
    with pytest.raises(ValueError, match="needs at least"):
        pass_at_k(4, 1, 5)


@pytest.mark.parametrize("ties", [False, True])
def test_expectations_over_subsets(ties: bool) -> None:
    """Against enumeration; equal scores are averaged over the tied samples."""
    rng = random.Random(0)
    for _ in range(40):
        problem = random_problem(rng, 6, ties=ties)
        for n in range(1, 7):
            votes, best, likely, best_possible = [], [], [], []
            for subset in itertools.combinations(range(6), n):
                counts = Counter(a for i in subset if (a := problem.answers[i]) is not None)
                top = max(counts.values(), default=0)
                winner = next((problem.answers[i] for i in subset
                               if problem.answers[i] is not None
                               and counts[problem.answers[i]] == top), None)  # fmt: skip
                votes.append(winner == 1)
                assert problem.scores is not None
                high = max(problem.scores[i] for i in subset)
                tied = [problem.correct[i] for i in subset if problem.scores[i] == high]
                best.append(sum(tied) / len(tied))
                assert problem.logprobs is not None
                probable = max(subset, key=problem.logprobs.__getitem__)
                likely.append(problem.correct[probable])
                best_possible.append(any(problem.correct[i] for i in subset))
            assert majority(problem, n) == pytest.approx(np.mean(votes))
            assert oracle(problem, n) == pytest.approx(np.mean(best_possible))
            assert best_of_n(problem, n) == pytest.approx(np.mean(best))
            assert most_likely(problem, n) == pytest.approx(np.mean(likely))


def test_equal_decimals_vote_together_and_ties_go_to_the_first() -> None:
    problem = grade_samples("#### 42", ["#### 42.0", "#### 7", "#### 42", "no answer"])
    assert problem.correct == (True, False, True, False)
    assert majority(problem, 4) == 1.0
    assert majority(Graded((Decimal(7), Decimal(42)), (False, True)), 2) == 0.0
    assert majority(Graded((Decimal(42), Decimal(7)), (True, False)), 2) == 1.0
    assert majority(Graded((None, None), (False, False)), 2) == 0.0


def test_majority_of_many_samples_uses_blocks() -> None:
    n = 40  # 40 over 20 is 1.4e11 subsets
    answers = tuple(Decimal(1 if i < 20 else 2) for i in range(n))
    assert majority(Graded(answers, tuple(a == 1 for a in answers)), 20) == 0.5


def test_bad_calls() -> None:
    problem = Graded((Decimal(1),), (True,))
    with pytest.raises(ValueError, match="majority of 2"):
        majority(problem, 2)
    with pytest.raises(ValueError, match="scored samples"):
        best_of_n(problem, 1)
    with pytest.raises(ValueError, match="scored samples"):
        most_likely(Graded((Decimal(1),), (True,), (0.5,)), 1)
    with pytest.raises(ValueError, match="2 scores for 1"):
        grade_samples("1", ["1"], scores=[1, 2])
    with pytest.raises(ValueError, match="0 scores for 1"):
        grade_samples("1", ["1"], logprobs=[])
    with pytest.raises(ValueError, match="same count"):
        reasoning_report([problem, Graded((), ())], key="x")
    with pytest.raises(DataError):
        grade_samples("no number", ["1"])


def many_problems(n: int = 120, samples: int = 8) -> list[Graded]:
    rng = random.Random(3)
    problems = []
    for _ in range(n):
        skill = rng.random()
        answers = tuple(
            Decimal(1) if rng.random() < skill else Decimal(rng.randint(2, 4))
            for _ in range(samples)
        )
        correct = tuple(a == 1 for a in answers)
        scores = tuple(min(1.0, max(0.0, rng.gauss(0.75 if ok else 0.25, 0.2))) for ok in correct)
        logprobs = tuple(rng.gauss(-5 if ok else -6, 1.0) for ok in correct)
        problems.append(Graded(answers, correct, scores, logprobs))
    return problems


def test_report() -> None:
    problems = many_problems()
    report = reasoning_report(problems, key="toy.test/T0.7", ns=(1, 2, 4, 8, 16))
    values = {score.metric: score for score in report.scores}
    assert list(values) == [
        "pass@1", "majority@8", "pass@8", "most_likely_of_8", "best_of_8",
        "best_of_8 - majority", "best_of_8 - most_likely", "best_of_8 - pass@1",
        "auroc", "auroc_within", "ece",
    ]  # fmt: skip
    assert report.not_evaluated == []
    assert values["pass@1"].value == pytest.approx(np.mean([p.correct for p in problems]))
    assert report.base_rate == pytest.approx(values["pass@1"].value)
    difference = values["best_of_8 - majority"]
    assert difference.value == pytest.approx(values["best_of_8"].value - values["majority@8"].value)
    for score in report.scores:
        assert score.ci95 is not None
        assert score.ci95[0] <= score.value <= score.ci95[1] or score.metric == "ece"
        assert score.key == "toy.test/T0.7"
    assert report.curves is not None
    assert report.curves["n"] == [1, 2, 4, 8]
    for name in (
        "majority",
        "most_likely",
        "verifier",
        "oracle",
    ):  # of one sample
        assert report.curves[name][0]["value"] == pytest.approx(values["pass@1"].value)
        assert len(report.curves[name]) == 4
    assert sum(b.n for b in report.bins) == 120 * 8
    assert report.auroc is values["auroc"]
    assert report.ece is values["ece"]


def test_a_paired_difference_is_tighter_than_its_parts() -> None:
    values = {s.metric: s for s in reasoning_report(many_problems(), key="x").scores}

    def width(metric: str) -> float:
        low, high = values[metric].ci95 or (0, 0)
        return high - low

    assert width("best_of_8 - pass@1") < width("best_of_8") + width("pass@1")


def test_nothing_right_is_not_evaluable() -> None:
    problems = [Graded((Decimal(2), None), (False, False), (0.2, 0.4)) for _ in range(50)]
    report = reasoning_report(problems, key="x")
    assert report.curves is None
    assert report.auroc is None
    (pass1,) = [s for s in report.scores if s.metric == "pass@1"]
    assert pass1.value == 0
    assert pass1.ci95 is not None and pass1.ci95[1] > 0.05
    assert "no sample is right" in pass1.note
    reasons = {missing.what: missing.why for missing in report.not_evaluated}
    assert "none of 2 samples" in reasons["x pass@n, majority and best-of-n"]
    assert "all 100 answers are wrong" in reasons["x auroc"]


def test_no_problems_and_no_verifier() -> None:
    assert reasoning_report([], key="x").not_evaluated[0].why == "there are no problems"
    problems = [Graded(p.answers, p.correct) for p in many_problems(20)]
    report = reasoning_report(problems, key="x")
    assert report.curves is not None and report.curves["verifier"] is None
    assert report.bins == []
    single = reasoning_report([Graded((Decimal(1),), (True,))] * 3, key="x")
    assert single.curves is None
    assert [s.metric for s in single.scores] == ["pass@1"]


def test_exact_match() -> None:
    gold = ["#### 4", "#### 5", "#### 6"]
    answers = ["<<2+2=4>> #### 4", "the answer is 5", "<<2*4=6>> #### 7"]
    results = {r.metric: r for r in exact_match(gold, answers, key="x") if hasattr(r, "metric")}
    assert results["exact_match"].value == pytest.approx(1 / 3)
    assert results["exact_match_flexible"].value == pytest.approx(2 / 3)
    assert results["step_accuracy"].value == 0.5
    assert results["step_accuracy"].n == 2
    (missing,) = exact_match([], [], key="x")
    assert missing.why == "there are no problems"  # type: ignore[union-attr]
