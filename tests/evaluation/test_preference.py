import pytest

from modern_llm.evaluation.intervals import wilson
from modern_llm.evaluation.preference import preference_scores
from modern_llm.evaluation.scores import NotEvaluated, Score, split_results


def test_preference_scores() -> None:
    results = preference_scores(
        [-10.0, -5.0, -6.0, -4.0],
        [-12.0, -4.0, -6.0, -9.0],
        chosen_lengths=[10, 2, 3, 4],
        rejected_lengths=[8, 4, 3, 3],
        key="hh.test",
        reference=([-11.0, -9.0, -6.0, -4.0], [-10.0, -4.0, -7.0, -9.0]),
    )
    values = {r.metric: r for r in results if isinstance(r, Score)}
    assert values["preference_accuracy"].value == (1 + 0 + 0.5 + 1) / 4
    # per token: -1.0 > -1.5; -2.5 < -1; -2 = -2; -1 > -3
    assert values["preference_accuracy_per_token"].value == (1 + 0 + 0.5 + 1) / 4
    assert values["longer_answer_baseline"].value == (1 + 0 + 0.5 + 1) / 4
    # margins: 1 > -2; 4 > 0; 0 < 1; 0 = 0
    assert values["implicit_reward_accuracy"].value == (1 + 1 + 0 + 0.5) / 4
    assert values["implicit_reward_accuracy"].ci95 == wilson(2.5, 4)
    assert values["implicit_reward_accuracy - longer_answer_baseline"].value == 0
    assert all(r.n == 4 for r in values.values())


def test_without_reference_or_pairs() -> None:
    results = preference_scores([-1.0], [-2.0], chosen_lengths=[1], rejected_lengths=[1], key="x")
    assert len(results) == 3
    (missing,) = preference_scores([], [], chosen_lengths=[], rejected_lengths=[], key="x")
    assert isinstance(missing, NotEvaluated)
    with pytest.raises(ValueError, match="differ in length"):
        preference_scores([1.0], [1.0, 2.0], chosen_lengths=[1], rejected_lengths=[1], key="x")


def test_results_become_plain_rows() -> None:
    scores, missing = split_results(
        [Score("k", "m", 1.0, (0.5, 1.5), 3), NotEvaluated("a", "because")]
    )
    assert scores == [
        {"key": "k", "metric": "m", "value": 1.0, "ci95": (0.5, 1.5), "n": 3, "note": ""}
    ]
    assert missing == [{"what": "a", "why": "because"}]
