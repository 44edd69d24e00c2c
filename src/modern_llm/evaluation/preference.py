"""Preference accuracy from log-probabilities, beside the longer-answer baseline."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from modern_llm.evaluation.intervals import Floats, bootstrap_mean, wilson
from modern_llm.evaluation.scores import NotEvaluated, Result, Score


def _wins(first: ArrayLike, second: ArrayLike) -> Floats:
    """1 where ``first`` is greater, 1/2 where equal, else 0."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    return np.asarray((a > b) + (a == b) / 2, dtype=np.float64)


def preference_scores(
    chosen_logp: Sequence[float],
    rejected_logp: Sequence[float],
    *,
    chosen_lengths: Sequence[int],
    rejected_lengths: Sequence[int],
    key: str,
    reference: tuple[Sequence[float], Sequence[float]] | None = None,
) -> list[Result]:
    """How often the chosen answer of a pair is preferred; ties count one half.

    Args:
        chosen_logp: log-probability of each chosen answer given its prompt, in nats, summed over
            its tokens.
        rejected_logp: the same of the rejected answers.
        chosen_lengths: tokens of each chosen answer.
        rejected_lengths: tokens of each rejected answer.
        key: of the results.
        reference: ``(chosen, rejected)`` log-probabilities under the reference model; adds the
            accuracy of the implicit reward (Rafailov et al. 2023, arXiv:2305.18290, sec. 4).

    Returns:
        ``preference_accuracy`` (summed log-probability), ``preference_accuracy_per_token`` (mean
        log-probability), ``longer_answer_baseline``, and with a reference
        ``implicit_reward_accuracy`` and its paired gain over the longer-answer baseline.
    """
    n = len(chosen_logp)
    if n == 0:
        return [NotEvaluated(f"{key} preference accuracy", "there are no pairs")]
    chosen, rejected = np.asarray(chosen_logp), np.asarray(rejected_logp)
    lengths = np.asarray(chosen_lengths), np.asarray(rejected_lengths)
    if any(len(column) != n for column in (rejected, *lengths)):
        raise ValueError("columns of pairs differ in length")
    longer = _wins(*lengths)
    wins = {
        "preference_accuracy": _wins(chosen, rejected),
        "preference_accuracy_per_token": _wins(chosen / lengths[0], rejected / lengths[1]),
        "longer_answer_baseline": longer,
    }
    if reference is not None:
        margin = chosen - np.asarray(reference[0]), rejected - np.asarray(reference[1])
        wins["implicit_reward_accuracy"] = _wins(*margin)
    results: list[Result] = [
        Score(key, metric, float(won.mean()), wilson(float(won.sum()), n), n, "Wilson interval")
        for metric, won in wins.items()
    ]
    if reference is not None:
        gain = wins["implicit_reward_accuracy"] - longer
        note = "paired difference; bootstrap over pairs"
        metric = "implicit_reward_accuracy - longer_answer_baseline"
        results.append(Score(key, metric, float(gain.mean()), bootstrap_mean(gain), n, note))
    return results
