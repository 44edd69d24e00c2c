"""The one door to the ``evaluate`` library: text metrics by name, on the policy's answers.

``evaluate.load`` takes a metric's script from the hub, from its cache, or from a local folder; one
of the three is needed. No score of the pipeline itself depends on it.
"""

from collections.abc import Sequence
from numbers import Real
from typing import Any

from modern_llm.evaluation.intervals import bootstrap_mean
from modern_llm.evaluation.scores import NotEvaluated, Result, Score


def text_metric(
    name: str, predictions: Sequence[str], references: Sequence[str], *, key: str
) -> list[Result]:
    """Compute a metric of the ``evaluate`` library.

    Every plain number that the metric returns becomes a score. A list with one number a
    prediction becomes its mean with a bootstrap interval; other values have no interval.

    Args:
        name: name on the hub (``rouge``, ``bleu``) or path of a local metric folder or script.
            Its code runs: name only what you trust.
        predictions: texts of the model.
        references: one right text for each.
        key: of the results; the metric's name is appended.

    Returns:
        Scores, or the reason why there are none: no copy of the metric, a library that it needs
        is missing, or its code failed.
    """
    what = f"{key}/{name}"
    if not predictions:
        return [NotEvaluated(what, "there are no answers")]
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    loaded = load_metric(name, what)
    if isinstance(loaded, NotEvaluated):
        return [loaded]
    try:
        values = loaded.compute(predictions=list(predictions), references=list(references)) or {}
    except Exception as error:
        return [_failed(what, error)]
    scores = (_score(what, metric, value, len(predictions)) for metric, value in values.items())
    results: list[Result] = [score for score in scores if score is not None]
    return results or [NotEvaluated(what, "the metric returned no number")]


def load_metric(name: str, what: str) -> Any:
    """A metric by name or path, or a `NotEvaluated` of ``what`` with the reason."""
    try:
        import evaluate
    except ImportError as error:
        return NotEvaluated(what, f"the library 'evaluate' cannot be imported: {error}")
    try:
        return evaluate.load(name)
    except (FileNotFoundError, ConnectionError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        why = (
            f"evaluate.load('{name}') found neither the hub nor a local copy ({reason}); "
            "give the path of a metric folder, or run once where the hub can be reached"
        )
        return NotEvaluated(what, why)
    except ImportError as error:
        return NotEvaluated(what, f"the metric needs a library that is not installed: {error}")
    except Exception as error:  # a script from elsewhere costs this metric at most
        return _failed(what, error)


def _failed(what: str, error: Exception) -> NotEvaluated:
    reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
    return NotEvaluated(what, f"the metric's own code failed: {reason}")


def _score(key: str, metric: str, value: Any, n: int) -> Score | None:
    if isinstance(value, Real):
        return Score(key, metric, float(value), None, n, "computed by the library evaluate")
    if isinstance(value, list) and len(value) == n and all(isinstance(v, Real) for v in value):
        mean = sum(map(float, value)) / n
        note = "computed by the library evaluate; bootstrap over answers"
        return Score(key, metric, mean, bootstrap_mean(value), n, note)
    return None
