"""Experiments side by side: a table with intervals and verdicts, plots, CSV and a report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modern_llm.config import Hold
from modern_llm.errors import ConfigError
from modern_llm.experiments.results import ExperimentResult, Point
from modern_llm.experiments.verdicts import ALPHA, Verdict, compare_to, mean_of
from modern_llm.registry import suggest
from modern_llm.reporting.comparison import write_comparison
from modern_llm.runtime.artifacts import Policy
from modern_llm.runtime.environment import environment

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
QUALITY = ("final_val_loss", "bits_per_byte")  # what a verdict can be on; lower is better
METRICS = (
    *("final_val_loss", "final_val_perplexity", "bits_per_byte", "params_millions"),
    *("flops_per_token", "train_flops", "tokens", "tokens_per_s", "mfu", "train_time_s"),
    *("epoch_time_s", "peak_memory_mb", "model_size_mb", "prefill_tokens_per_s"),
    *("inference_tokens_per_s", "first_token_s"),
)
# What a study can measure apart, one arm at a time; metric -> value.
SPEEDS = (
    *("tokens_per_s", "mfu", "prefill_tokens_per_s", "inference_tokens_per_s", "first_token_s"),
    "peak_memory_mb",
)
Speeds = dict[str, float]
EQUAL = {"tokens": "tokens", "params": "params_millions", "flops": "train_flops"} | {
    "seconds": "train_time_s"
}
EQUAL_WITHIN = 0.01


def compare_experiments(
    results: Sequence[ExperimentResult],
    *,
    reference: str | None = None,
    metric: str = "final_val_loss",
    title: str = "comparison",
    output: Path | str | None = None,
    on_exists: Policy = "timestamp",
) -> "pd.DataFrame":
    """A row an experiment, with mean, 95 % interval and n over seeds of every metric.

    Columns: ``experiment``, ``summary``, ``n``, each of `METRICS` with ``<metric>_low`` and
    ``_high`` (t interval over seeds; empty for one seed), and against the reference
    ``difference``, ``difference_low``, ``difference_high``, ``p``, ``verdict``, ``test``.

    Args:
        results: two or more, of one validation text.
        reference: experiment that the others are compared with; default: the first.
        metric: what the verdict is on: ``final_val_loss``, or ``bits_per_byte``, which also
            compares between tokenizers and training texts.
        title: of the report.
        output: folder for ``comparison.csv``, ``comparison.json``, plots and ``report.md``;
            ``None`` writes nothing.
        on_exists: what to do where another comparison stands in ``output``.

    Raises:
        ConfigError: the results do not compare, or ``reference`` is none of them.
        ProtectedPathError: ``output`` cannot be written.
    """
    import pandas as pd

    record = comparison_record(results, reference=reference, metric=metric, title=title)
    if output is not None:
        write_comparison(Path(output), record, on_exists=on_exists)
    return pd.DataFrame(record["rows"])


def comparison_record(
    results: Sequence[ExperimentResult],
    *,
    reference: str | None,
    metric: str,
    title: str,
    hold: Hold | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All that plots and report of a comparison are made from; see `compare_experiments`.

    Args:
        results: two or more, of one validation text.
        reference: experiment that the others are compared with; default: the first.
        metric: what the verdict is on.
        title: of the report.
        hold: what was meant to be held equal; what is equal is measured and told in any case.
        facts: what else the report tells: ``description``, ``command``, ``left_out``, ``speeds``.

    Raises:
        ConfigError: the results do not compare, or ``reference`` is none of them.
    """
    _check(results, metric)
    chosen = _reference(results, reference)
    others = [result for result in results if result is not chosen]
    values = [result.values(metric) for result in others]
    found = compare_to(chosen.values(metric), values, lower_is_better=True)
    verdicts = {result.name: verdict for result, verdict in zip(others, found, strict=True)}
    facts = dict(facts or {})
    rows = [_row(result, verdicts.get(result.name), facts) for result in results]
    return {
        "format": FORMAT,
        "title": title,
        "metric": metric,
        "reference": chosen.name,
        "alpha": ALPHA,
        "hold": hold,
        "equal": {name: _is_equal(rows, column) for name, column in EQUAL.items()},
        "rows": rows,
        "bands": {result.name: _band(result) for result in results},
        "experiments": [asdict(result) for result in results],
        "facts": facts,
        "versions": environment()["versions"],
    }


def _check(results: Sequence[ExperimentResult], metric: str) -> None:
    if metric not in QUALITY:
        raise ConfigError(
            f"metric={metric!r}{suggest(metric, QUALITY)}: one of {', '.join(QUALITY)}"
        )
    names = [result.name for result in results]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two results are called {', '.join(twice)}; give each a name of its own")
    if len(results) < 2:
        raise ConfigError(f"a comparison needs two results or more, not {len(results)}")
    if empty := [result.name for result in results if not result.seeds]:
        raise ConfigError(f"no seed has a result: {', '.join(empty)}; leave out, or run again")
    _check_same(results, "validation_sha256", "different validation texts: nothing compares")
    way_out = "compare bits_per_byte (--metric bits_per_byte), which does not depend on tokens"
    if metric != "bits_per_byte":
        _check_same(results, "tokenizer_sha256", f"different tokenizers: {way_out}")
        _check_same(results, "train_sha256", "different training texts: train them on one")


def _check_same(results: Sequence[ExperimentResult], key: str, told: str) -> None:
    first = results[0]
    if other := [r.name for r in results if r.data[key] != first.data[key]]:
        raise ConfigError(f"{', '.join(other)} and {first.name} have {told}")


def _reference(results: Sequence[ExperimentResult], name: str | None) -> ExperimentResult:
    if name is None:
        return results[0]
    for result in results:
        if result.name == name:
            return result
    names = [result.name for result in results]
    raise ConfigError(
        f"reference={name!r} is none of them{suggest(name, names)} ({', '.join(names)})"
    )


def _row(
    result: ExperimentResult, verdict: Verdict | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "experiment": result.name,
        "summary": result.summary,
        "n": len(result.seeds),
    }
    for metric in METRICS:
        mean = mean_of(list(result.values(metric).values()))
        row[metric] = mean and mean.value
        row[f"{metric}_low"] = mean and mean.low
        row[f"{metric}_high"] = mean and mean.high
    # Those of each alone stand in for those of many at once, and decide its seconds.
    apart: Speeds = dict(facts.get("speeds", {}).get(result.name, {}))
    if speed := apart.get("tokens_per_s"):
        apart["train_time_s"] = row["tokens"] / speed
        apart["epoch_time_s"] = result.data["train_tokens"] / speed
    for metric, value in apart.items():
        row |= {metric: value, f"{metric}_low": None, f"{metric}_high": None}
    told = verdict or Verdict("reference", None, None, None, None, len(result.seeds), "none")
    return row | {
        "difference": told.difference,
        "difference_low": told.low,
        "difference_high": told.high,
        "p": told.p,
        "verdict": told.word,
        "test": told.test,
    }


def _band(result: ExperimentResult) -> list[dict[str, Any]]:
    """Mean validation loss and its interval at every step that all seeds have a pass at."""
    passes: dict[int, list[Point]] = {}
    for one in result.seeds:
        for point in one.curve:
            passes.setdefault(point.step, []).append(point)
    band = []
    for step, points in sorted(passes.items()):
        mean = mean_of([point.loss for point in points])
        if mean is not None and len(points) == len(result.seeds):
            ends = {"low": mean.low, "high": mean.high}
            band.append({"step": step, "tokens": points[0].tokens, "loss": mean.value, **ends})
    return band


def _is_equal(rows: Sequence[Mapping[str, Any]], metric: str) -> bool:
    """Whether all rows agree in the mean of a metric within 1 %."""
    values: list[float] = [row[metric] for row in rows]
    return max(values) - min(values) <= EQUAL_WITHIN * max(values)
